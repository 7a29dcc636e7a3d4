"""Hot reload of a transformers model from a checkpoint folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aliasparam import TensorSpec, checkpoint_names, reload
from aliasparam.errors import AliasError
from aliasparam.host import host_bytes
from aliasparam.reload.observe import Hooks
from aliasparam.reload.policies import PolicyName

from ...checkpoint import WHOLE, CheckpointError, CheckpointFolder, QuantConfig, expert_layers
from .config_match import check_config, check_schemes
from .conversions import Conversion
from .experts import Experts
from .files_read import need_same_files
from .fp8 import Fp8Linear
from .fused_experts import FusedExperts
from .modules import Projection
from .names import Names
from .scales import check_block_scales, check_scalars
from .source import castable, check_names
from .ties import need_equal, tied_names
from .unwrap import need_whole, plain_name, unwrapped


def reload_folder(
    model: Any,
    folder: str | Path,
    *,
    on_bytes: Callable[[int], None] | None = None,
    chunk_bytes: int | None = None,
    strict: bool = False,
    policy: PolicyName = "write-through",
    hooks: Hooks | None = None,
) -> int:
    """Replace all weights of a serving model with those of ``folder``, in place; returns the bytes read.

    Everything that headers and scales can tell is checked before the first write, so a bad folder leaves the model as it was
    and answering (block scales are read twice). Tensors are read ahead in pieces of a quarter of ``chunk_bytes``. Where processes
    share the experts all call this, and what one of them refuses before the first write all refuse.

    Args:
        model: loaded through this package's quantizer; compiled or wrapped, too.
        folder: a checkpoint of the same architecture and format. Entries of its config.json which differ and do not change
            what the model computes are named in a warning.
        on_bytes: called with the bytes of every piece, for progress bars.
        chunk_bytes: host memory that the files pass through; None for 64 MiB, pinned, with a GPU and 8 MiB without.
        strict: refuse a folder whose config.json differs in any entry.
        policy, hooks: of the session, as for :func:`aliasparam.reload`.

    Raises:
        CheckpointError: missing, unexpected, truncated or ill-fitting tensors, or another architecture.
        ScaleError: global scales of fused projections that differ, or that are not finite and positive.
    """
    model = unwrapped(model)
    try:
        plan = _Plan.checked(model, folder, strict=strict)
    except Exception as error:
        _agree(model, error)
        raise
    _agree(model, None)
    told = on_bytes or (lambda _: None)
    total = 0
    opened = reload(model, policy=policy, source="folder", hooks=hooks)
    on_gpu = any(tensor.is_cuda for tensor in model.parameters())
    size = chunk_bytes if chunk_bytes is not None else 64 << 20 if on_gpu else 8 << 20
    buffer = host_bytes(max(size, 8), pinned=on_gpu)
    with torch.no_grad(), closing(plan.source), opened as session:
        parts = [plan.parts.get(name, (plain_name(name), WHOLE, WHOLE)) for name in plan.targets]
        targets = list(plan.targets.items())
        for index, box, piece in plan.source.stream(parts, buffer):
            name, target = targets[index]
            value = piece.to(target.dtype)  # as a cold load casts what is not quantized
            scalar = not target.shape or not piece.dim()
            session.update(name, value.reshape(target.shape) if scalar else value, box=None if scalar else box)
            total += piece.nbytes
            told(piece.nbytes)
        for conversion in plan.conversions:
            pieces = {name: plan.source.read(name) for name in conversion.sources}
            for name, value in conversion.convert(model, pieces).items():
                session.update(plan.converted[name], value.to(plan.dtypes[name]))
            told(sum(piece.nbytes for piece in pieces.values()))
            total += sum(piece.nbytes for piece in pieces.values())
        plan.source.check_unchanged()
    return total


@dataclass(frozen=True)
class _Plan:
    """A reload of which everything was checked that headers and scales can tell.

    Attributes:
        source: opened.
        targets: the model's tensors by name. But for words of wrappers the names are the files'.
        parts: what is read for a name where it is not the whole tensor of that name.
        conversions: what transformers' operations make other tensors of.
        converted: the plain names of their results to the model's.
        dtypes: of these results in the model.
    """

    source: CheckpointFolder
    targets: Mapping[str, TensorSpec]
    parts: Mapping[str, tuple[str, slice, slice]]
    conversions: Sequence[Conversion]
    converted: Mapping[str, str]
    dtypes: Mapping[str, torch.dtype]

    @classmethod
    def checked(cls, model: Any, folder: str | Path, *, strict: bool) -> _Plan:
        source = CheckpointFolder(folder)
        need_same_files(source)
        config = check_config(model, source.path, strict=strict)
        names = checkpoint_names(model)
        conversions = _names(model).conversions
        results = {name for conversion in conversions for name in conversion.targets}
        converted = {plain_name(name): name for name in names if plain_name(name) in results}
        live = {name: tensor for name, tensor in names.items() if name not in converted.values()}
        need_whole(live)
        parts, experts = check_experts(model, source, {plain_name(name): name for name in live})
        specs = {plain_name(n): TensorSpec.of(t) for n, t in live.items() if n not in parts}
        expected = {name: castable(name, spec, source.tensors) for name, spec in specs.items()}
        _check_names(model, source, expected, experts, {n: names[full] for n, full in converted.items()})
        need_equal(tied_names(model, _names(model).ours), source, specs)
        modules = files_of(model, live)
        check_schemes(model, modules, config, source.tensors, source.path)
        check_scalars(model, modules, source)
        check_block_scales(model, live, parts, source)
        targets = {name: TensorSpec.of(tensor) for name, tensor in live.items()}
        return cls(source, targets, parts, conversions, converted, {n: names[full].dtype for n, full in converted.items()})


def _check_names(
    model: Any,
    source: CheckpointFolder,
    expected: Mapping[str, TensorSpec],
    experts: set[str],
    converted: Mapping[str, Tensor],
) -> None:
    """Raise CheckpointError for tensors that are missing, unexpected or do not fit, converted and tied ones included."""
    wanted = dict(expected)
    for conversion in _names(model).conversions:
        if not conversion.sources.keys() <= source.tensors.keys():
            wanted |= {n: TensorSpec((), torch.float32) for n in conversion.sources if n not in source.tensors}
            continue
        for name, spec in conversion.specs(model, {n: source.tensors[n].spec for n in conversion.sources}).items():
            if spec.shape != tuple(converted[name].shape):
                wanted[name] = TensorSpec.of(converted[name])
    check_names(model, source, _names(model), wanted, experts)


def _names(model: Any) -> Names:
    """What the model calls the tensors of the folder that it was loaded from."""
    return getattr(getattr(model, "hf_quantizer", None), "names", None) or Names()


def files_of(model: nn.Module, live: Mapping[str, Tensor]) -> dict[str, str]:
    """Path of each quantized linear module, and of fused experts, to its name in the files."""
    stored = {id(tensor): plain_name(name).rpartition(".")[0] for name, tensor in live.items()}
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, (Projection, Fp8Linear, FusedExperts)):
            plain = "weight" if isinstance(module, Fp8Linear) else "gate_up_proj"
            weight = module.kind.names.weight if isinstance(module, Projection) else plain
            found[path] = stored[id(module._parameters[weight])]  # also where a failed reload has left a refusing twin
    return found


def served_otherwise(model: Any, quantization: Mapping[str, Any]) -> str | None:
    """Why ``model`` is not what a folder of the same tensors and this quantization would be, if it is not."""
    model = unwrapped(model)
    live = checkpoint_names(model)
    try:
        config = QuantConfig.from_dict(quantization)
        check_schemes(model, files_of(model, live), config, {plain_name(name) for name in live}, "the folder")
    except AliasError as error:
        return str(error)
    return None


def _agree(model: nn.Module, error: Exception | None) -> None:
    """Where processes share the experts: what one of them refuses all refuse, before any has written."""
    if all(m.ranks.size == 1 for m in model.modules() if isinstance(m, Experts)):
        return
    refusals: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(refusals, None if error is None else str(error))
    refused = {rank: text for rank, text in enumerate(refusals) if text}
    if refused and error is None:
        raise CheckpointError("another process refused this reload; nothing was loaded", found=refused)


def check_experts(
    model: nn.Module, folder: CheckpointFolder, live: Mapping[str, str]
) -> tuple[dict[str, tuple[str, slice, slice]], set[str]]:
    """Hold the folder's experts against the model's.

    Args:
        model: unwrapped.
        folder: opened.
        live: names in the files to those in the model's state dict.

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
        new = next((entry.name for key, entry in source.tensors.entries.items() if key not in module.names), None)
        if new is not None:
            raise CheckpointError("a tensor was not in the folder that was loaded first", name=f"{folder.path}: {new}")
        for part in source.parts():
            parts[live[module.names[part.key]]] = part.name, part.rows, part.columns
        lost = [name for key, name in module.names.items() if key not in source.tensors.entries]
        if lost:
            raise CheckpointError("the folder lacks tensors of experts", module=path, found=", ".join(lost[:3]))
        carried = {module.names[key] for key in module.names if live.get(module.names[key]) not in (None, *parts)}
        everyone |= {entry.name for entry in tensors.entries.values() if entry.name not in carried}
    return parts, everyone
