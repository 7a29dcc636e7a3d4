"""What a folder's scales make of a model, before anything is written: a reload and ``inspect`` refuse what a load refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from aliasparam.errors import AliasError
from aliasparam.host import HOST

from ...checkpoint import WHOLE, CheckpointFolder
from ...errors import ScaleError
from ...linear.scales import GlobalScales
from ...quantize.block_scales import need_block_scales
from ...quantize.global_scale import need_stored_scales
from .experts import Experts
from .fp8 import Fp8Linear
from .fuse import groups, made_of
from .fused_experts import FusedExperts
from .modules import FusedLinear, Projection, ProjectionKind
from .source import Source
from .unwrap import plain_name


def check_scalars(model: nn.Module, files: Mapping[str, str], folder: CheckpointFolder) -> None:
    """Read the scalars of a new checkpoint and refuse those which the layers cannot take; of experts apart :class:`Experts` does.

    Args:
        model: that serves, unwrapped.
        files: path of each quantized module to its name in the files.
        folder: opened.

    Raises:
        ScaleError: names module and tensors.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    for path, module in model.named_modules():
        if isinstance(module, FusedLinear):
            members = module.members()
            _need_linear(path, members[0].kind, [files[paths[id(member)]] for member in members], folder)
        elif isinstance(module, (Fp8Linear, FusedExperts)):
            module.check_scales(path, _reader(folder, files[path]))


def refused_scalars(model: nn.Module, source: Source, backend: str) -> Iterator[AliasError]:
    """What a load from ``source`` would refuse of global scales, and of the layers that these make.

    Args:
        model: on the meta device, with quantized modules in their places; it is spent.
        source: whose headers were checked.
        backend: of linear layers.
    """
    folder, files, meta = source.folder, source.modules(), torch.device("meta")
    assert folder is not None
    checks: list[Callable[[], object]] = []
    names: dict[int, str] = {}
    for path, module in list(model.named_modules()):
        if isinstance(module, Experts):
            checks.append(partial(module.create, folder, source.experts[path], meta))
        elif isinstance(module, (Fp8Linear, FusedExperts)):
            if isinstance(module, FusedExperts):
                module.create(meta)
            checks.append(partial(module.check_scales, path, _reader(folder, files[path])))
        elif isinstance(module, Projection):
            names[id(module)] = path
            name = module.kind.names.weight_global
            module.register_parameter(name, nn.Parameter(folder.read(f"{files[path]}.{name}"), requires_grad=False))
    for _, _, members in groups(model):
        paths = [names[id(member)] for member in members]
        checks.append(partial(_made, members, backend))
        checks.append(partial(_need_linear, paths[0], members[0].kind, [files[one] for one in paths], folder))
    for check in checks:
        try:
            check()
        except AliasError as error:
            yield error


def _made(members: Sequence[Projection], backend: str) -> FusedLinear:
    with torch.device("meta"):
        return made_of(members, members[0].kind.method(backend))


def _reader(folder: CheckpointFolder, prefix: str) -> Callable[[str], Tensor]:
    return lambda leaf: folder.read(f"{prefix}.{leaf}")


def _need_linear(path: str, kind: ProjectionKind, members: Sequence[str], folder: CheckpointFolder) -> None:
    """Of projections that are served as one."""
    tensors, missing = kind.names, kind.missing_input_scale
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
    if kind.input_scale:
        inputs = {f"{m}.{tensors.input_global}": float(folder.read(f"{m}.{tensors.input_global}")) for m in members}
    need_stored_scales({**weight_scales, **(inputs if missing == "refuse" else {})}, path)
    derived, weight = GlobalScales(tensors.reciprocal, missing), torch.tensor(list(weight_scales.values()), device=HOST)
    try:
        if inputs:
            given = torch.tensor(list(inputs.values()), device=HOST)
            derived.alpha(given, weight)
            derived.input_scale_inv(given)
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
            stored, rows, columns = parts.get(name, (plain_name(name), WHOLE, WHOLE))
            for _, piece in folder.chunks(stored, rows=rows, columns=columns):
                need_block_scales(piece, f"{folder.path}: {stored}", signed=id(tensor) not in unsigned)
