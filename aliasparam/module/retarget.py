"""Moving sources from one kernel layout to another in place."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..errors import DeclarationError, PointerError
from ..storage.locks import all_locked
from ..storage.reorder import move
from .adopt import adopt
from .declarations import Alias, AnyLayout
from .layout_of import layout_of
from .names import ModuleNames
from .planning import plan_for
from .verdict import StoragePlan

Plans = dict[str, tuple[AnyLayout | None, StoragePlan]]


def plan_retarget(names: ModuleNames, layouts: Mapping[str, AnyLayout | str | None]) -> Plans:
    """See :meth:`AliasRegistry.check_retarget`."""
    return {name: _plan(names, name, layout) for name, layout in layouts.items()}


def retarget(names: ModuleNames, layouts: Mapping[str, AnyLayout | str | None]) -> None:
    """See :meth:`AliasRegistry.retarget`."""
    plans = plan_retarget(names, layouts)
    with torch.no_grad():
        adopt(names)
        sources = [names.sources[name] for name in plans]
        with all_locked(s.storage.lock_number for s in sources if s.storage is not None):
            for source in sources:
                if source.storage is not None:
                    source.storage.need_writable()
            for source in sources:
                if source.storage is not None:
                    source.storage.changing()
                source.layout, source.plan = plans[source.name]
                if source.storage is not None:
                    move(source.storage, source.plan.layout)  # finished by adopt() where it is interrupted
        names.bind_kernel_names()


def _plan(names: ModuleNames, name: str, layout: AnyLayout | str | None) -> tuple[AnyLayout | None, StoragePlan]:
    source = names.sources.get(name)
    if source is None or not source.derived:
        raise DeclarationError(
            "only a source with an aliased kernel name has a layout to change",
            module=names.label,
            name=name,
            expected="the name of an aliased source",
            found=f"aliased sources {sorted(n for n, s in names.sources.items() if s.derived)}",
            remedy="Declare the pair with Alias first.",
        )
    if source.storage is not None and len(list(source.storage.listeners)) > 1:
        raise DeclarationError(
            "another module declares this tied weight too, to the layout it has",
            module=names.label,
            name=name,
            expected="a weight of one module",
            found=f"{len(list(source.storage.listeners))} modules that show it",
            remedy="Untie it with clone() before declaring, or declare it once.",
        )
    old = source.plan
    alias = Alias(name, source.derived, layout, dtype=old.kernel.dtype)
    found = layout_of(names.label, alias, old.source)
    plan = plan_for(names.label, alias, found, old.source)
    if not plan.reason.aliases or plan.capacity > old.capacity or plan.bound.regions != old.bound.regions:
        raise PointerError(
            f"this layout does not fit the storage: {plan.reason.value}",
            module=names.label,
            name=name,
            expected=f"{old.bound.regions} regions, at most {old.nbytes} bytes",
            found=f"{plan.bound.regions} regions, {plan.nbytes} bytes ({plan.kernel})",
            remedy="Plan room for it at creation: Alias(room_for=(layout,)).",
        )
    return found, StoragePlan(plan.source, plan.kernel, plan.layout, plan.bound, old.capacity, plan.reason)
