"""Turning loaded projections into fused layers over aliased storage, one layer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from aliasparam import AliasRegistry, registry_of

from ...linear import NvFp4LinearMethod
from .modules import FusedLinear, Projection, ProjectionKind
from .shared_call import share_calls

#: Sibling names which read the same input, and the name of their fused layer.
FUSED_GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("gate_up_proj", ("gate_proj", "up_proj")),
)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def fuse_projections(model: nn.Module, backend: str, retarget_to: Sequence[str] = ()) -> int:
    """Give every loaded :class:`Projection` of ``model`` its fused layer; returns the number of fused layers.

    Peak extra memory is one layer: its placeholders are released as soon as their bytes are taken.
    """
    methods: dict[ProjectionKind, NvFp4LinearMethod] = {}
    count = 0
    for holder, name, members in groups(model):
        kind = members[0].kind
        method = methods.setdefault(kind, kind.method(backend, retarget_to))
        _fuse(holder, name, members, method)
        count += 1
    return count


def groups(model: nn.Module) -> Iterator[tuple[nn.Module, str, list[Projection]]]:
    """(module that gets the fused layer, its name there, its projections) of a model whose global scales are known."""
    for parent in list(model.modules()):
        if not isinstance(parent, FusedLinear):
            yield from _groups(parent)


def _groups(parent: nn.Module) -> Iterator[tuple[nn.Module, str, list[Projection]]]:
    """The same among the direct children of ``parent``.

    A container runs or counts all its children, so it gets none: the layer of a single projection is a child of that.
    """
    children = {n: m for n, m in parent.named_children() if isinstance(m, Projection) and not m._fused}
    for fused_name, members in () if isinstance(parent, _CONTAINERS) else FUSED_GROUPS:
        found = [children[m] for m in members if m in children]
        if len(found) == len(members) and not hasattr(parent, fused_name) and _fit_together(found):
            for member in members:
                del children[member]
            yield parent, fused_name, found
    for child in children.values():
        yield child, "kernel", [child]


def _fit_together(members: list[Projection]) -> bool:
    first = members[0]
    alike = all((m.in_features, m.kind) == (first.in_features, first.kind) for m in members)
    if not alike or first.kind.pre_quant_scale:
        return False
    # One alpha serves the fused layer. Where the exporter did not unify the scales, the layers stay apart and right.
    scale = first.kind.names.weight_global
    return all(torch.equal(m.get_parameter(scale).reshape(1), first.get_parameter(scale).reshape(1)) for m in members)


def made_of(members: Sequence[Projection], method: NvFp4LinearMethod) -> FusedLinear:
    """Their fused layer, empty, on the default device."""
    return FusedLinear(method, members[0].in_features, [m.out_features for m in members], members[0].dtype)


def _fuse(parent: nn.Module, name: str, members: list[Projection], method: NvFp4LinearMethod) -> None:
    tensors = members[0].tensors()
    with torch.device(members[0].get_parameter(next(iter(tensors))).device):
        fused = made_of(members, method)
    registry = registry_of(fused)
    if registry is None:
        raise AssertionError("create_weights did not declare the layer")
    for tensor in tensors:
        shards = _shards(fused.get_parameter(tensor), members, tensor)
        with torch.no_grad():
            for member, shard in zip(members, shards, strict=True):
                shard.copy_(member.get_parameter(tensor))
        _show(registry, tensor, members, shards)
    parent.register_module(name, fused)
    for index, member in enumerate(members):
        member.attach(fused, index)
    if len(members) > 1:
        share_calls(parent)


def _shards(whole: Tensor, members: list[Projection], name: str) -> list[Tensor]:
    """Each member's part of a fused tensor, in the shape that the checkpoint has."""
    shapes = [member.get_parameter(name).shape for member in members]
    if len(shapes[0]) < 2 and whole.shape[0] == len(members):
        return [whole[i : i + 1].view(shape) for i, shape in enumerate(shapes)]
    return [whole] if len(members) == 1 else list(torch.split(whole, [m.out_features for m in members]))


def _show(registry: AliasRegistry, name: str, members: list[Projection], shards: list[Tensor]) -> None:
    registry.show_shards(name, [(member, name, shard) for member, shard in zip(members, shards, strict=True)])
