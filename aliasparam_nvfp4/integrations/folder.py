"""A folder that a served model is to be updated from, checked before the first write."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from torch import Tensor

from aliasparam import TensorSpec
from aliasparam.spec import is_wide

from ..checkpoint import CheckpointError, CheckpointFolder
from ..checkpoint.quant_config import read_json
from ..checkpoint.validate import fits
from ..errors import ScaleError
from ..quantize.block_scales import need_block_scales
from ..quantize.global_scale import EXPECTED, are_scales
from .agreement import World

#: Ends of names of scalars, ModelOpt's and compressed-tensors'.
_GLOBAL, _INPUT = ("weight_scale_2", "weight_global_scale"), ("input_scale", "input_global_scale")
#: Tensors that loaders take from elsewhere where they are missing.
_TIED = ("lm_head.",)

#: Entries of config.json that decide what tensors mean.
_MEANING = (
    "architectures", "model_type", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "num_experts", "num_local_experts",
    "n_routed_experts", "num_experts_per_tok", "hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
    "tie_word_embeddings", "norm_topk_prob",
)  # fmt: skip


def open_checked(path: str, before: str, known: Mapping[str, TensorSpec], world: World) -> CheckpointFolder:
    """The folder, opened, where headers, config and scales say that it can be served.

    Args:
        path: the new folder.
        before: the folder that is served; its config.json is compared where it can be read.
        known: names, shapes and dtypes of the first load; empty where they are not known.
        world: block scales are read by turns.

    Raises:
        CheckpointError: files that do not check, another model, or tensors that are missing or of another shape or dtype.
        ScaleError: global scales that are not finite and positive, or block scales that are NaN.
    """
    folder = CheckpointFolder(path)
    try:
        _check_config(Path(path), Path(before))
        optional = _INPUT if _is_w4a16(Path(path)) else ()
        _check_headers(folder, known, _headers(before), optional)
        _check_scales(folder, world, optional)
    except BaseException:
        folder.close()
        raise
    return folder


def check_folder(path: str, before: str, world: World) -> None:
    """The same for an engine that reads folders itself: the tensors of the folder that is served must be there. Where either is
    no local folder nothing is known, and nothing refused."""
    if not Path(path).is_dir():
        if Path(path).is_absolute():
            raise CheckpointError("there is no such folder; nothing was loaded", name=path)
        return
    if not any(Path(path).glob("*.safetensors")):
        return
    known = {name: spec for name, spec in _headers(before).items() if not name.startswith(_TIED)}
    open_checked(path, before, known, world).close()


def stream(folder: CheckpointFolder, known: Mapping[str, TensorSpec]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that the first load had too, read when it is asked for; at the end the files must be unchanged."""
    for name in folder.tensors:
        if name in known or not known:
            yield name, folder.read(name)
    folder.check_unchanged()


def _check_config(path: Path, before: Path) -> None:
    found = _config(path)
    try:
        wanted = _config(before)
    except CheckpointError:  # damaged since
        return
    if found is None or wanted is None:
        return
    differing = {key: (wanted.get(key), found.get(key)) for key in _MEANING if wanted.get(key) != found.get(key)}
    ways = [_quantization(config) for config in (wanted, found)]
    if ways[0] != ways[1]:
        differing["quantization_config"] = ways[0], ways[1]
    if differing:
        raise CheckpointError(
            "config.json describes another model than the one that is served",
            name=str(path),
            expected={key: old for key, (old, _) in differing.items()},
            found={key: new for key, (_, new) in differing.items()},
            remedy="Start the engine from this folder instead.",
        )


def _config(path: Path) -> Mapping[str, Any] | None:
    """None for a hub's name, and for a folder of weights alone."""
    file = path / "config.json"
    return read_json(file) if os.path.lexists(file) else None


def _quantization(config: Mapping[str, Any]) -> Any:
    way = config.get("quantization_config")
    return {key: way.get(key) for key in ("quant_method", "quant_algo", "group_size")} if isinstance(way, dict) else way


def _is_w4a16(path: Path) -> bool:
    """Whose input scales are left over, where there are any."""
    return (_quantization(_config(path) or {}) or {}).get("quant_algo") == "W4A16_NVFP4"


def _headers(path: str) -> dict[str, TensorSpec]:
    """The tensors of the folder that is served, some of which its loader may have left out; none where it is gone."""
    try:
        with closing(CheckpointFolder(path)) as folder:
            return {name: entry.spec for name, entry in folder.tensors.items()}
    except CheckpointError:
        return {}


def _check_headers(
    folder: CheckpointFolder, known: Mapping[str, TensorSpec], before: Collection[str], optional: tuple[str, ...]
) -> None:
    have = folder.tensors
    extra = (
        [f"unexpected: {n} ({have[n].spec})" for n in have if not (n in known or n in before or n.endswith(optional))]
        if known
        else []
    )
    missing = [f"missing: {n} ({spec})" for n, spec in known.items() if not (n in have or n.endswith(optional))]
    unfit = [
        f"{name}: expected {spec}, found {have[name].spec}"
        for name, spec in known.items()
        if name in have and not same(have[name].spec, spec)
    ]
    lines = [*missing, *unfit, *extra]
    if lines:
        raise CheckpointError(
            "the folder does not fit the checkpoint that was loaded first; nothing was written",
            name=str(folder.path),
            found="\n            ".join([*lines[:5], *([f"… and {len(lines) - 5} more"] if len(lines) > 5 else [])]),
            remedy="Export the checkpoint again from the same model, or start the engine from this folder.",
        )


def _check_scales(folder: CheckpointFolder, world: World, optional: tuple[str, ...]) -> None:
    read = (*_GLOBAL, *(end for end in _INPUT if end not in optional))
    for name in folder.tensors:
        # An expert that met no token in calibration has an input scale of 0: the largest of its layer counts then.
        if name.endswith(read) and not (name.endswith(_INPUT) and ".experts." in name):
            value = folder.read(name)
            if not bool(are_scales(value).all()):
                found = value.tolist()
                raise ScaleError("a global scale is not a scale", name=f"{folder.path}: {name}", expected=EXPECTED, found=found)
    block_scales = [n for n, entry in folder.tensors.items() if n.endswith("weight_scale") and entry.dtype.itemsize == 1]
    for name in block_scales[world.rank :: world.ranks]:
        for _, piece in folder.chunks(name):
            need_block_scales(piece, f"{folder.path}: {name}")


def same(found: TensorSpec, wanted: TensorSpec) -> bool:
    """Alike, but for floats of two bytes or more, which loaders convert."""
    wide = is_wide(found.dtype) and is_wide(wanted.dtype)
    return fits(TensorSpec(found.shape, wanted.dtype) if wide else found, wanted)
