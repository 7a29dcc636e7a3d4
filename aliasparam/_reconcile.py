"""Taking in what engines put in the place of declared names.

[Note: who is right] The registry's storages are the truth. Engines replace Parameters by ``setattr``, move and re-create them
while loading; so before every verb the names are reconciled: a foreign tensor under a declared name is adopted (its bytes go
into the storage, its loader attributes onto our parameter) or refused, and kernel names are bound again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ._parameter import _Aliased, adopt_class, loader_attributes, make_parameter, same_view
from ._planning import Binding, Source
from ._storage import State
from ._take import take
from ._transform import TensorSpec
from .errors import AdoptionError

if TYPE_CHECKING:
    from ._registry import AliasRegistry


def reconcile(registry: AliasRegistry) -> None:
    """Adopt or refuse whatever was put under the declared names since the last verb."""
    foreign: list[tuple[Source, Binding, Tensor]] = [
        (source, binding, tensor)
        for source in registry.sources.values()
        for binding in (source.bindings or [Binding(registry.module, source.name, None)])  # type: ignore[arg-type]
        if (tensor := binding.module._parameters.get(binding.name)) is not binding.parameter and tensor is not None
    ]
    for source, binding, found in foreign:
        _check_adoptable(registry, source, binding, found)
    _follow_device(registry, foreign)
    for source, binding, found in foreign:
        _adopt(registry, source, binding, found)
    _drop_left_behind(registry)
    for source in registry.sources.values():
        registry.bind(source)
    registry.bind_kernel_names()


def _drop_left_behind(registry: AliasRegistry) -> None:
    """Derived tensors whose sources moved to another device are computed anew there."""
    here = registry.device()
    for derived in registry.derived.values():
        if derived.tensor is not None and derived.tensor.device != here:
            derived.tensor, derived.seen = None, None


def _check_adoptable(registry: AliasRegistry, source: Source, binding: Binding, tensor: Tensor) -> None:
    expected = source.plan.source if source.storage is None else TensorSpec.of(binding.parameter._alias_memory)
    if TensorSpec.of(tensor) != expected:
        raise AdoptionError(
            "a tensor that does not fit was put in the place of a declared name",
            module=registry.label,
            name=binding.name,
            expected=expected,
            found=TensorSpec.of(tensor),
            remedy="Declared weights keep shape and dtype (Module.half() and the like cannot apply to them). "
            "registry.rebind() puts the library's parameter back.",
        )


def _follow_device(registry: AliasRegistry, foreign: list[tuple[Source, Binding, Tensor]]) -> None:
    """After Module.to(device) every name holds a tensor elsewhere: follow, as a whole."""
    here = registry.device()
    devices = {t.device for _, _, t in foreign if t.device.type != "meta"}
    if here is None or devices <= {here}:
        return
    count = sum(len(s.bindings) for s in registry.sources.values())
    if len(devices) != 1 or len(foreign) != count:
        raise AdoptionError(
            "only some of the declared names are on another device",
            module=registry.label,
            expected=f"all {count} names on {here}, or all elsewhere",
            found=f"{len(foreign)} names on {sorted(map(str, devices))}",
            remedy="Move the whole module: module.to(device).",
        )
    device = devices.pop()
    for source in registry.sources.values():
        if source.storage is None:
            raise AssertionError(f"{registry.label}.{source.name}: bound without storage")
        source.storage.relocate(device)
        for binding in source.bindings:
            old = binding.parameter
            binding.parameter = make_parameter(source.storage, same_view(source.storage, old._alias_memory), type(old))
            binding.parameter.__dict__.update(loader_attributes(old))


def _adopt(registry: AliasRegistry, source: Source, binding: Binding, tensor: Tensor) -> None:
    if tensor.device.type == "meta":
        return  # a placeholder: nothing to take, and our name comes back
    if source.storage is None:
        take(registry, source, tensor, State.CHECKPOINT)
        return
    adopt_class(binding.parameter, type(tensor))
    binding.parameter.__dict__.update(loader_attributes(tensor))
    same_memory = isinstance(tensor, _Aliased) and tensor._alias_storage is source.storage
    if not same_memory:
        binding.parameter.copy_(tensor.detach())
