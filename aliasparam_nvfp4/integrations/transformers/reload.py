"""Hot reload of a transformers model from a checkpoint folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aliasparam import TensorSpec, checkpoint_names, reload

from ...checkpoint import WHOLE, CheckpointError, CheckpointFolder, QuantConfig, check_tensors, expert_layers
from ...errors import ScaleError
from ...scales import GlobalScales, need_block_scales
from .config import model_config
from .experts import Experts
from .modules import FusedLinear
from .source import castable

#: Config entries which may differ between two checkpoints of one model.
_FREE_KEYS = frozenset(
    {"_name_or_path", "transformers_version", "quantization_config", "torch_dtype", "dtype", "architectures", "use_cache"}
)


def reload_folder(
    model: Any, folder: str | Path, *, on_bytes: Callable[[int], None] | None = None, chunk_bytes: int = 8 << 20
) -> int:
    """Replace all weights of a serving model with those of ``folder``, in place; returns the bytes read.

    Everything that headers and scales can tell is checked before the first write, so a bad folder leaves the model as it was
    and answering (block scales are read twice). Tensors are streamed in pieces of at most ``chunk_bytes``. Where processes
    share the experts all call this, and what one of them refuses before the first write all refuse.

    Args:
        model: loaded through this package's quantizer.
        folder: a checkpoint of the same architecture and format.
        on_bytes: called with the bytes of every piece, for progress bars.
        chunk_bytes: upper bound of one piece.

    Raises:
        CheckpointError: missing, unexpected, truncated or ill-fitting tensors, or another architecture.
        ScaleError: scales of fused projections that differ, or scales that are none.
    """
    try:
        plan = _Plan.checked(model, folder)
    except Exception as error:
        _agree(model, error)
        raise
    _agree(model, None)
    total = 0
    with torch.no_grad(), closing(plan.source), reload(model) as session:
        for name in plan.names:
            stored, rows, columns = plan.parts.get(name, (name, WHOLE, WHOLE))
            for first_row, piece in plan.source.chunks(stored, chunk_bytes, rows=rows, columns=columns):
                value = piece.to(plan.names[name])  # as a cold load casts what is not quantized
                session.update(name, value, first_row=first_row if piece.dim() else None)
                total += piece.nbytes
                if on_bytes is not None:
                    on_bytes(piece.nbytes)
    return total


@dataclass(frozen=True)
class _Plan:
    """A reload of which everything was checked that headers and scales can tell.

    Attributes:
        source: opened.
        names: the model's, which are the files', and the dtype that the model has each in.
        parts: what is read for a name where it is not the whole tensor of that name.
    """

    source: CheckpointFolder
    names: Mapping[str, torch.dtype]
    parts: Mapping[str, tuple[str, slice, slice]]

    @classmethod
    def checked(cls, model: Any, folder: str | Path) -> _Plan:
        source = CheckpointFolder(folder)
        check_config(model, source.path)
        names = checkpoint_names(model)
        parts, others = check_experts(model, source)
        expected = {n: castable(n, TensorSpec.of(t), source.tensors) for n, t in names.items() if n not in parts}
        check_tensors(source, expected, ignore={*(getattr(model, "all_tied_weights_keys", None) or ()), *others})
        check_fused_scales(model, names, source)
        check_block_scales(model, names, parts, source)
        return cls(source, {name: tensor.dtype for name, tensor in names.items()}, parts)


def _agree(model: nn.Module, error: Exception | None) -> None:
    """Where processes share the experts: what one of them refuses all refuse, before any has written."""
    if all(m.ranks.size == 1 for m in model.modules() if isinstance(m, Experts)):
        return
    refusals: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(refusals, None if error is None else str(error))
    refused = {rank: text for rank, text in enumerate(refusals) if text}
    if refused and error is None:
        raise CheckpointError("another process refused this reload; nothing was loaded", found=refused)


def check_experts(model: nn.Module, folder: CheckpointFolder) -> tuple[dict[str, tuple[str, slice, slice]], set[str]]:
    """Hold the folder's experts against the model's.

    Returns:
        Name in the model's state dict to what this process reads for it: (name in the folder, rows, columns); and the names of
        all experts' tensors in the folder, those of other ranks too.

    Raises:
        CheckpointError: no experts where the model has them, or experts that do not fit.
        ScaleError: scales which are none, or which the runner cannot take.
    """
    layers = expert_layers(folder.tensors)
    parts: dict[str, tuple[str, slice, slice]] = {}
    everyone: set[str] = set()
    for path, module in model.named_modules():
        if not isinstance(module, Experts):
            continue
        if module.layer not in layers:
            raise CheckpointError("the folder has no experts of this layer", module=path, name=f"{folder.path}: {module.layer}")
        tensors = layers[module.layer]
        source = module.source(folder, tensors)
        source.check()
        parts |= {module.names[part.key]: (part.name, part.rows, part.columns) for part in source.parts()}
        everyone |= {entry.name for entry in tensors.entries.values()}
    return parts, everyone


def check_config(model: Any, folder: Path) -> None:
    """Refuse a folder whose config.json describes another model or another quantization."""
    parsed = QuantConfig.from_folder(folder)
    held = model.config.quantization_config
    held_parsed = held.parsed if hasattr(held, "parsed") else QuantConfig.from_dict(held)
    if (parsed.algo, parsed.group_size, parsed.tensors) != (held_parsed.algo, held_parsed.group_size, held_parsed.tensors):
        raise CheckpointError(
            "the folder is quantized in another way",
            name=str(folder),
            expected=f"{held_parsed.algo} as {held_parsed.tensors.name} stores it, group size {held_parsed.group_size}",
            found=f"{parsed.algo} as {parsed.tensors.name} stores it, group size {parsed.group_size}",
            remedy="Start the model cold from this folder instead.",
        )
    new, old = model_config(folder).to_dict(), model.config.to_dict()
    differing = sorted(k for k in (new.keys() | old.keys()) - _FREE_KEYS if new.get(k) != old.get(k))
    if differing:
        raise CheckpointError(
            "the folder's config.json describes another model",
            name=str(folder),
            expected={k: old.get(k) for k in differing[:5]},
            found={k: new.get(k) for k in differing[:5]},
            remedy="Start the model cold from this folder instead.",
        )


def check_fused_scales(model: nn.Module, names: Mapping[str, Tensor], folder: CheckpointFolder) -> None:
    """Read the scalars of the new checkpoint and refuse those which the fused layers cannot take."""
    stored = {id(tensor): name for name, tensor in names.items()}
    for path, fused in model.named_modules():
        if not isinstance(fused, FusedLinear):
            continue
        tensors = fused.quant_method.checkpoint
        members = [stored[id(m.get_parameter(tensors.weight))].rpartition(".")[0] for m in fused.members()]
        weight_scales = {m: float(folder.read(f"{m}.{tensors.weight_global}")) for m in members}
        if len(set(weight_scales.values())) > 1:
            raise ScaleError(
                "fused projections come with different weight global scales",
                module=path,
                name=tensors.weight_global,
                expected="one value for all of them, as in the checkpoint that was loaded first",
                found=weight_scales,
                remedy="Export with unified scales, or start the model cold from this folder: it then stays unfused.",
            )
        inputs: dict[str, float] = {}
        if fused.quant_method.input_scale:
            inputs = {f"{m}.{tensors.input_global}": float(folder.read(f"{m}.{tensors.input_global}")) for m in members}
        bad = {n: v for n, v in {**weight_scales, **inputs}.items() if not 0 < v < float("inf")}
        if bad:
            raise ScaleError("a global scale is not a scale", module=path, expected="finite and positive", found=bad)
        derived, weight = GlobalScales(tensors.reciprocal), torch.tensor(list(weight_scales.values()))
        try:
            if inputs:
                derived.alpha(torch.tensor(list(inputs.values())), weight)
                derived.input_scale_inv(torch.tensor(list(inputs.values())))
        except ScaleError as error:
            raise error.located(module=path) from None


def check_block_scales(
    model: nn.Module, names: Mapping[str, Tensor], parts: Mapping[str, tuple[str, slice, slice]], folder: CheckpointFolder
) -> None:
    """Read the block scales that this process will take, and refuse those which no kernel can."""
    unsigned = {
        id(member.get_parameter(fused.quant_method.checkpoint.block_scale))
        for fused in model.modules()
        if isinstance(fused, FusedLinear) and not fused.__dict__["nvfp4_backend"].layout.signed_scales
        for member in fused.members()
    }
    for name, tensor in names.items():
        if tensor.dtype is torch.float8_e4m3fn and name.endswith("weight_scale"):
            stored, rows, columns = parts.get(name, (name, WHOLE, WHOLE))
            for _, piece in folder.chunks(stored, rows=rows, columns=columns):
                need_block_scales(piece, f"{folder.path}: {stored}", signed=id(tensor) not in unsigned)
