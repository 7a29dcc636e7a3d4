"""Taking in what engines put in the place of declared names.

[Note: who is right] The registry's storages are the truth. Engines replace Parameters by ``setattr``, move and re-create them
while loading; so before every verb a foreign tensor under a declared name is adopted (its values go into the storage, its
loader attributes onto our parameter) or refused, and kernel names are bound again.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from ..errors import AdoptionError, located
from ..spec import TensorSpec, other_kind
from ..tensors.faces import _Aliased, follow, loader_attributes
from ..tensors.parameter import AliasedParameter, adopt_class, is_same_name, take_over
from ..torch_private import shares_memory
from .allocate import allocate, check_tie
from .containers import standing
from .names import ModuleNames
from .planning import Binding, Source


def adopt(registry: ModuleNames) -> None:
    """Adopt or refuse whatever was put under the declared names since the last verb."""
    with located(module=registry.label):
        _need_shards_here(registry)
        foreign: list[tuple[Source, Binding, Tensor]] = [
            (source, binding, tensor)
            for source in registry.sources.values()
            for binding in (source.bindings or [Binding(registry.module, source.name, None)])  # type: ignore[arg-type]
            if (tensor := standing(binding.module, binding.name)) is not binding.parameter and tensor is not None
        ]
        for source, binding, found in foreign:
            _check_adoptable(source, binding, found)
        _follow_device(registry, foreign)
        values = [apart(registry, found) for _, _, found in foreign]  # all are read before the first is written
        for (source, binding, found), value in zip(foreign, values, strict=True):
            _take_in(registry, source, binding, found, value)
        finish_moves(registry)
        registry.rebind()


def _need_shards_here(registry: ModuleNames) -> None:
    for binding in registry.left():
        shown = binding.parameter
        raise AdoptionError(
            "the module that shows a part of a declared weight was replaced",
            name=binding.name,
            expected=f"the {type(binding.module).__name__} that shows {list(shown.shape)} of {shown._alias_storage.label}",
            found="another module in its place, or none: the weight is still what that one shows",
            remedy="Put it back and load the new values into it; or registry.show_shards(...) with the modules that are there.",
        )


def finish_moves(registry: ModuleNames) -> None:
    """Bring storages into the order that is planned for them, also where a retarget was interrupted."""
    for source in registry.sources.values():
        storage = source.storage
        if storage is not None and storage.layout != source.layout:
            with storage.lock:
                storage.before_write()
                storage.move(source.layout)


def _check_adoptable(source: Source, binding: Binding, tensor: Tensor) -> None:
    if source.storage is None:
        check_tie(source, tensor)
    expected = source.plan.source if source.storage is None else TensorSpec.of(binding.parameter)
    found: object = other_kind(tensor) or TensorSpec.of(tensor)
    if isinstance(tensor, AliasedParameter) and source.storage not in (None, tensor._alias_storage):
        found = f"{tensor._alias_storage.label}, which was declared by itself"
    if found != expected:
        raise AdoptionError(
            "a tensor that does not fit was put in the place of a declared name",
            name=binding.name,
            expected=expected,
            found=found,
            remedy="Declared weights keep shape, dtype (Module.half() and the like cannot apply to them) and memory (tie names "
            "before declaring them). registry.rebind() puts the library's parameter back.",
        )


def _follow_device(registry: ModuleNames, foreign: list[tuple[Source, Binding, Tensor]]) -> None:
    """After Module.to(device) every name holds a tensor elsewhere: follow, as a whole."""
    here, devices = registry.device(), {tensor.device for _, _, tensor in foreign if not tensor.is_meta}
    if here is None or devices <= {here}:
        return
    if len(devices) != 1 or len(foreign) != len(registry.bindings()):
        raise AdoptionError(
            "only some of the declared names are on another device",
            expected=f"all {len(registry.bindings())} names on {here}, or all elsewhere",
            found=f"{len(foreign)} names on {sorted(map(str, devices))}",
            remedy="Move the whole module: module.to(device).",
        )
    for binding in registry.bindings():
        follow(binding.parameter, *devices)


def apart(registry: ModuleNames, tensor: Tensor) -> Tensor:
    """The values of a tensor, in memory that no write to a declared name changes."""
    if isinstance(tensor, _Aliased):
        return tensor if tensor.is_meta else tensor.detach().clone()
    mine = tensor.detach()
    return mine.clone() if any(shares_memory(mine, storage.buffer) for storage in registry.storages()) else mine


def _take_in(registry: ModuleNames, source: Source, binding: Binding, tensor: Tensor, value: Tensor) -> None:
    if source.storage is None:
        allocate(registry, source, tensor, loaded=True)
        return
    if tensor.is_meta:
        return  # a placeholder: nothing to take, and our name comes back
    ours = binding.parameter
    taken: AliasedParameter | None
    if is_same_name(tensor, ours):
        taken = cast(AliasedParameter, tensor)
        _keep(taken, ours)
    else:
        ours.copy_(value)
        _keep(ours, tensor)
        # Whoever else holds it (a module it is tied to) goes on seeing what is loaded.
        taken = take_over(tensor, source.storage, ours._alias_geometry, like=ours)
    binding.parameter = ours if taken is None else taken


def _keep(parameter: AliasedParameter, other: Tensor) -> None:
    """Give ``parameter`` the class and the loader attributes of ``other`` too."""
    adopt_class(parameter, type(other))
    parameter.__dict__.update(loader_attributes(other))
