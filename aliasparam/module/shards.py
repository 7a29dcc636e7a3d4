"""Showing one storage as several names: the q, k and v of a fused projection."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from ..errors import DeclarationError
from ..storage.coverage import Coverage
from ..tensors.faces import _Aliased, loader_attributes
from ..tensors.geometry import boxes_under, place_of, rows_under
from ..tensors.parameter import make_parameter
from .planning import Binding, Source


def shown_as(source: Source, shards: Iterable[tuple[nn.Module, str, Tensor]]) -> list[Binding]:
    """The names of :meth:`AliasRegistry.show_shards`."""
    storage = source.need_storage("show shards of")
    bindings, covered, once = [], Coverage(storage.bound.shape), True
    for module, shard_name, view in shards:
        if not isinstance(view, _Aliased) or view._alias_storage is not storage:
            raise DeclarationError(
                "a shard must be a view of the source it shows",
                expected=f"a slice or view of {storage.label}",
                found=type(view).__name__,
                remedy="Slice the declared Parameter itself: layer.weight[:n].",
            )
        geometry = view._alias_geometry
        place = place_of(storage, geometry)
        for box in [place.box] if place is not None else boxes_under(storage, geometry, rows_under(storage, geometry)):
            once = covered.add(box) and once
        old = module._parameters.get(shard_name)
        parameter = make_parameter(storage, geometry, type(old) if old is not None else nn.Parameter)
        if old is not None:
            parameter.__dict__.update(loader_attributes(old))
        bindings.append(Binding(module, shard_name, parameter))
    if not once or not covered.whole:
        raise DeclarationError(
            "the shards must cover the source exactly once",
            expected=f"{source.plan.source.numel} elements, each in one shard",
            found="some elements twice" if not once else f"without {covered.missing()[:3]}",
            remedy="Slice the source into parts that lie beside each other.",
        )
    return bindings
