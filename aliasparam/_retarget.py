"""Moving sources from one kernel format to another in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ._planning import probe_transform
from ._reconcile import reconcile
from ._storage import all_locked
from ._transform import Transform
from ._verdict import StoragePlan, plan_storage
from .errors import DeclarationError, PointerError

if TYPE_CHECKING:
    from ._registry import AliasRegistry


def retarget(registry: AliasRegistry, transforms: Mapping[str, Transform]) -> None:
    """See :meth:`AliasRegistry.retarget`. If a conversion fails, every source still has its old format."""
    plans = {name: _plan_for(registry, name, transform) for name, transform in transforms.items()}
    with torch.no_grad():
        reconcile(registry)
        registry.mark_stale()
        storages = {name: storage for name in plans if (storage := registry.sources[name].storage) is not None}
        with all_locked(storages.values()):
            for storage in storages.values():
                storage.need_unexposed("retarget")
            for storage in storages.values():
                storage.restore()
            for name, plan in plans.items():
                if name in storages:
                    storages[name].retarget(plan)
                registry.sources[name].plan = plan
        registry.bind_kernel_names()


def _plan_for(registry: AliasRegistry, name: str, transform: Transform) -> StoragePlan:
    source = registry.sources.get(name)
    if source is None or not source.derived:
        raise DeclarationError(
            "only a source with an aliased kernel name has a format to change",
            module=registry.label,
            name=name,
            expected="the name of an aliased source",
            found=f"aliased sources {sorted(n for n, s in registry.sources.items() if s.derived)}",
            remedy="Declare the pair with Alias first.",
        )
    if source.storage is not None and len(source.storage.listeners) > 1:
        raise DeclarationError(
            "another module declares this tied weight too, to the format it has",
            module=registry.label,
            name=name,
            expected="a weight of one module",
            found=f"{len(source.storage.listeners)} modules that show it",
            remedy="Untie it with clone() before declaring, or declare it once.",
        )
    old, plan = source.plan, plan_storage(source.plan.source, transform)
    if not plan.reason.aliases or plan.regions != old.regions or plan.region_capacity > old.region_capacity:
        raise PointerError(
            f"this kernel format does not fit the storage: {plan.reason.value}",
            module=registry.label,
            name=name,
            expected=f"{old.regions} regions of at most {old.region_capacity} bytes",
            found=f"{plan.regions} regions of {plan.region_capacity} bytes ({plan.derived})",
            remedy="Plan room for it at creation: Alias(room_for=(transform,)).",
        )
    probe_transform(registry.label, name, transform, plan.source)
    return replace(plan, region_capacity=old.region_capacity)
