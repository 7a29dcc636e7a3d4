"""Showing one storage as several names: the q, k and v of a fused projection."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ._parameter import _Aliased, loader_attributes, make_parameter
from ._planning import Binding
from ._regions import bytes_of
from ._storage import AliasedStorage
from ._written import WrittenBytes
from .errors import DeclarationError, StateError

if TYPE_CHECKING:
    from ._registry import AliasRegistry


def show(registry: AliasRegistry, name: str, shards: Iterable[tuple[nn.Module, str, Tensor]]) -> None:
    """See :meth:`AliasRegistry.show_shards`."""
    source = registry.sources[name]
    if source.storage is None:
        raise StateError(
            "a source on the meta device has no memory to show",
            module=registry.label,
            name=name,
            expected="a loaded source",
            found="one on meta",
            remedy="Show shards after the module has memory.",
        )
    bindings = []
    for module, shard_name, view in shards:
        if not isinstance(view, _Aliased) or view._alias_storage is not source.storage:
            raise DeclarationError(
                "a shard must be a view of the source it shows",
                module=registry.label,
                name=name,
                expected=f"a slice or view of {source.storage.label}",
                found=type(view).__name__,
                remedy="Slice the declared Parameter itself: layer.weight[:n].",
            )
        old = module._parameters.get(shard_name)
        parameter = make_parameter(source.storage, view._alias_memory, type(old) if old is not None else nn.Parameter)
        if old is not None:
            parameter.__dict__.update(loader_attributes(old))
        bindings.append(Binding(module, shard_name, parameter))
    count = sum(b.parameter.numel() for b in bindings)
    if count != source.plan.source.numel or not _covers(source.storage, [b.parameter._alias_memory for b in bindings]):
        raise DeclarationError(
            "the shards must cover the source exactly once",
            module=registry.label,
            name=name,
            expected=f"{source.plan.source.numel} elements, each in one shard",
            found=f"{count} elements" + (", some of them twice" if count == source.plan.source.numel else ""),
            remedy="Slice the source into parts that lie beside each other.",
        )
    registry.module._parameters.pop(name, None)
    source.bindings = bindings
    registry.bind(source)


def _covers(storage: AliasedStorage, views: list[Tensor]) -> bool:
    """Whether views with as many elements as the source have each of them once."""
    extents = sorted(bytes_of(view) for view in views if view.numel())
    if all(end <= first for (_, end), (first, _) in pairwise(extents)):
        return True
    written = WrittenBytes()  # columns, say: they reach over each other
    for view in views:
        written.add(view)
    return written.has(storage.checkpoint, storage.plan.nbytes)
