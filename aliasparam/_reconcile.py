"""Taking in what engines put in the place of declared names.

[Note: who is right] The registry's storages are the truth. Engines replace Parameters by ``setattr``, move and re-create them
while loading; so before every verb the names are reconciled: a foreign tensor under a declared name is adopted (its bytes go
into the storage, its loader attributes onto our parameter) or refused, and kernel names are bound again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import Tensor

from ._parameter import (
    AliasedParameter,
    _Aliased,
    adopt_class,
    is_same_name,
    loader_attributes,
    make_parameter,
    take_over,
)
from ._planning import Binding, Source
from ._regions import same_view
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
    _right_kernel_names(registry)


def _right_kernel_names(registry: AliasRegistry) -> None:
    """Other code may have given a kernel name other memory, or written it. See [Note: foreign writes]."""
    for _, kernel in registry.kernels():
        if kernel.was_moved:
            kernel.put_back()
    for storage in registry.storages():
        with storage.lock:
            storage.notice()


def _drop_left_behind(registry: AliasRegistry) -> None:
    """Derived tensors whose sources moved to another device are computed anew there."""
    here = registry.device()
    for derived in registry.derived.values():
        if derived.kernel is not None and derived.kernel.memory.device != here:
            derived.kernel, derived.seen = None, None


def _check_adoptable(registry: AliasRegistry, source: Source, binding: Binding, tensor: Tensor) -> None:
    expected = source.plan.source if source.storage is None else TensorSpec.of(binding.parameter._alias_memory)
    if isinstance(tensor, AliasedParameter) and source.storage not in (None, tensor._alias_storage):
        raise AdoptionError(
            "a Parameter that another module declared was tied to a name that was declared by itself",
            module=registry.label,
            name=binding.name,
            expected="a Parameter that is not declared",
            found=f"{tensor._alias_storage.label}",
            remedy="Tie the names before declaring them; or copy the values with copy_(). "
            "registry.rebind() puts the library's parameter back.",
        )
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
            binding.parameter = make_parameter(source.storage, same_view(source.storage.buffer, old._alias_memory), type(old))
            binding.parameter.__dict__.update(loader_attributes(old))


def _adopt(registry: AliasRegistry, source: Source, binding: Binding, tensor: Tensor) -> None:
    if tensor.device.type == "meta":
        return  # a placeholder: nothing to take, and our name comes back
    if source.storage is None:
        take(registry, source, tensor, State.CHECKPOINT)
        return
    if is_same_name(tensor, binding.parameter):
        _keep(cast(AliasedParameter, tensor), binding.parameter)
        binding.parameter = cast(AliasedParameter, tensor)
        return
    same_storage = isinstance(tensor, _Aliased) and tensor._alias_storage is source.storage
    # Another view of the same storage would be read while it is written.
    binding.parameter.copy_(tensor.detach().clone() if same_storage else tensor.detach())
    _keep(binding.parameter, tensor)
    if not isinstance(tensor, _Aliased):  # whoever else holds it (a module it is tied to) goes on seeing what is loaded
        memory = binding.parameter._alias_memory
        taken = take_over(tensor, source.storage, memory, like=binding.parameter)
        if taken is not None:
            binding.parameter = taken


def _keep(parameter: AliasedParameter, other: Tensor) -> None:
    """Give ``parameter`` the class and the loader attributes of ``other`` too."""
    adopt_class(parameter, type(other))
    parameter.__dict__.update(loader_attributes(other))
