"""Showing one storage as several names: the q, k and v of a fused projection."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ._parameter import _Aliased, loader_attributes, make_parameter
from ._planning import Binding
from .errors import DeclarationError, StateError

if TYPE_CHECKING:
    from ._registry import AliasRegistry


def show(registry: AliasRegistry, name: str, shards: Iterable[tuple[nn.Module, str, Tensor]]) -> None:
    """See :meth:`AliasRegistry.show_shards`."""
    source = registry.sources[name]
    if source.storage is None:
        raise StateError("a source on the meta device has no memory to show", module=registry.label, name=name)
    bindings = []
    for module, shard_name, view in shards:
        if not isinstance(view, _Aliased) or view._alias_storage is not source.storage:
            raise DeclarationError("a shard must be a view of the source it shows", module=registry.label, name=name)
        old = module._parameters.get(shard_name)
        parameter = make_parameter(source.storage, view._alias_memory, type(old) if old is not None else nn.Parameter)
        if old is not None:
            parameter.__dict__.update(loader_attributes(old))
        bindings.append(Binding(module, shard_name, parameter))
    if sum(b.parameter.numel() for b in bindings) != source.plan.source.numel:
        raise DeclarationError(
            "the shards must cover the source exactly once",
            module=registry.label,
            name=name,
            expected=f"{source.plan.source.numel} elements",
            found=f"{sum(b.parameter.numel() for b in bindings)} elements",
        )
    registry.module._parameters.pop(name, None)
    source.bindings = bindings
    registry.bind(source)
