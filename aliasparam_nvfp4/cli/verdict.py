"""Whether a folder will load, asked of its headers and scalars alone: no weights are read, and no GPU is needed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

from aliasparam.errors import AliasError

from ..checkpoint import CheckpointFolder, QuantConfig, TensorEntry
from ..quantize.block_scales import need_block_scales
from ..quantize.global_scale import EXPECTED, are_scales
from ..quantize.missing import Missing

#: How many reasons are listed.
_SHOWN = 8


@dataclass(frozen=True)
class Verdict:
    """``loads`` is None where nothing speaks against it but the model itself could not be asked."""

    loads: bool | None
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        answer = {True: "yes", False: "no", None: "not known"}[self.loads]
        return "\n  ".join([f"will load: {answer}", *self.reasons])


def will_load(
    folder: Path,
    config: QuantConfig,
    tensors: CheckpointFolder,
    on_module: Callable[[], None],
    *,
    deep: bool = False,
    missing: str = "refuse",
    backend: str = "auto",
    moe_backend: str = "auto",
) -> Verdict:
    """Hold headers against the model that config.json describes, and look at every global scale.

    Args:
        folder: the checkpoint.
        config: how it is quantized.
        tensors: the folder, opened.
        on_module: called for every module, for a progress bar.
        deep: also read all block scales.
        missing: what counts for missing input scales, see missing.py.
        backend, moe_backend: with which it would be served.
    """
    wrong, answer, read = list[str](), None, tensors.tensors
    try:
        answer = fits_the_model(folder, missing=cast(Missing, missing), backend=backend, moe_backend=moe_backend)
        read = read if answer is None else {name: entry for name, entry in read.items() if name not in answer.dropped}
    except AliasError as error:
        wrong.append(_text(error))
    wrong += _scalars(config, tensors, read, on_module, missing)
    if deep:
        wrong += _block_scales(config, tensors, read)
    if answer is not None and not wrong:
        wrong += map(_text, answer.refused)
    if wrong:
        more = [f"… and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        return Verdict(False, (*wrong[:_SHOWN], *more))
    if answer is None:
        return Verdict(None, ("the model itself was not asked, because transformers is not installed",))
    what = "headers fit the model, global scales are scales" + (", block scales too" if deep else "")
    return Verdict(True, (what, *_tokenizer_note(folder)))


def _text(error: AliasError) -> str:
    return str(error).replace("\n", "\n  ")


class _Answer(NamedTuple):
    """Of the model itself: what loading would refuse of global scales and backends, and the tensors which it does not read."""

    refused: Iterator[AliasError]
    dropped: Collection[str]


def fits_the_model(folder: Path, *, missing: Missing, backend: str, moe_backend: str) -> _Answer | None:
    """Build the model on the meta device and let the quantizer hold the headers against it. None without transformers.

    Raises:
        AliasError: what loading would raise of headers.
    """
    from importlib.util import find_spec

    if find_spec("transformers") is None or find_spec("accelerate") is None:
        return None
    from ..demo._quiet import quiet

    with quiet():
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.quantizers import AutoHfQuantizer

        from ..integrations.transformers.config import model_config, readable
        from ..integrations.transformers.files_read import files_to_read
        from ..integrations.transformers.quantizer import compressed_tensors_here, use_backend

        chosen = use_backend(backend, moe=moe_backend, missing_input_scale=missing)
        with compressed_tensors_here(), chosen, readable(folder, "build the model"):
            config = model_config(folder)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            quantizer = AutoHfQuantizer.from_config(config.quantization_config)
            # The headers are checked here, see ModelOptQuantizer.
            with closing(CheckpointFolder(folder)) as tensors:
                files = [str(file) for file in files_to_read(tensors)]
            quantizer.preprocess_model(model=model, config=config, checkpoint_files=files)
    return _Answer(quantizer.refused_scalars(model), quantizer.report.dropped)


def _tokenizer_note(folder: Path) -> tuple[str, ...]:
    from ..demo._quiet import quiet
    from ..integrations.transformers.config import tokenizer_of

    try:
        with quiet():
            tokenizer_of(folder)
    except AliasError as error:
        return (f"without a tokenizer, which generate, reload and serve need: {error.found}",)
    return ()


def _scalars(
    config: QuantConfig, folder: CheckpointFolder, read: Mapping[str, TensorEntry], on_module: Callable[[], None], missing: str
) -> Iterator[str]:
    """Global scales which are none, module by module of what is read."""
    names = config.tensors
    for module, entries in _modules(read, (names.weight_global, names.input_global, names.block_scale)).items():
        on_module()
        if names.block_scale not in entries:
            continue
        scheme = config.scheme_of(module, stored=names.input_global in entries)
        left_over = scheme is not None and scheme.inputs != "stored"
        asked = [names.weight_global] if left_over or missing != "refuse" else [names.weight_global, names.input_global]
        values = {name: folder.read(entries[name].name) for name in asked if name in entries and entries[name].nbytes}
        bad = [name for name, value in values.items() if not bool(are_scales(value.float()).all())]
        yield from (f"{entries[n].name}: not a scale: found {values[n].flatten().tolist()}, expected {EXPECTED}" for n in bad)
        if (fp8 := entries[names.block_scale]).dtype.itemsize > 1 and not bool(folder.read(fp8.name).isfinite().all()):
            yield f"{fp8.name}: a scale of FP8 weights is no number"


def _block_scales(config: QuantConfig, folder: CheckpointFolder, read: Mapping[str, TensorEntry]) -> Iterator[str]:
    import torch

    for entry in read.values():
        if entry.name.endswith(_ends(config.tensors.block_scale)) and entry.dtype is torch.float8_e4m3fn:
            try:
                for _, piece in folder.chunks(entry.name):
                    need_block_scales(piece, entry.name)
            except AliasError as error:
                yield f"{entry.name}: {error.message}: found {error.found}"


def _modules(tensors: Mapping[str, TensorEntry], leaves: Sequence[str]) -> dict[str, dict[str, TensorEntry]]:
    """Of each module its tensors that are called so."""
    found: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in tensors.items():
        for leaf in leaves:
            if name.endswith(_ends(leaf)):
                found.setdefault(name[: -len(leaf) - 1], {})[leaf] = entry
    return found


def _ends(leaf: str) -> tuple[str, str]:
    """Of a module, or of a projection of fused experts (gpt-oss)."""
    return f".{leaf}", f"_{leaf}"
