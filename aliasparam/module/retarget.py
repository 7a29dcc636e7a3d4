"""Moving sources from one kernel layout to another in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from ..errors import AliasError, DeclarationError, PointerError
from ..storage.locks import all_locked
from ..storage.reorder import move
from .adopt import adopt
from .declarations import Alias, AnyLayout
from .names import ModuleNames
from .planning import plan_of
from .verdict import StoragePlan


def plan_retarget(names: ModuleNames, layouts: Mapping[str, AnyLayout | str | None]) -> dict[str, StoragePlan]:
    """See :meth:`AliasRegistry.check_retarget`."""
    plans = {}
    for name, layout in layouts.items():
        try:
            plans[name] = _plan(names, name, layout)
        except AliasError as error:
            raise error.located(module=names.label, name=name) from error.__cause__
    return plans


def retarget(names: ModuleNames, layouts: Mapping[str, AnyLayout | str | None]) -> None:
    """See :meth:`AliasRegistry.retarget`."""
    plans = plan_retarget(names, layouts)
    with torch.no_grad():
        adopt(names)
        sources = [names.sources[name] for name in plans]
        storages = [source.storage for source in sources if source.storage is not None]
        with all_locked(storage.lock_number for storage in storages):
            for storage in storages:
                storage.need_writable()
            for source in sources:
                if source.storage is not None:
                    source.storage.changing()
                source.plan = plans[source.name]
                if source.storage is not None:
                    move(source.storage, source.layout)  # finished by adopt() where it is interrupted
        names.bind()


def _plan(names: ModuleNames, name: str, layout: AnyLayout | str | None) -> StoragePlan:
    source = names.sources.get(name)
    if source is None or not source.derived:
        raise DeclarationError(
            "only a source with an aliased kernel name has a layout to change",
            expected="the name of an aliased source",
            found=f"aliased sources {sorted(n for n, s in names.sources.items() if s.derived)}",
            remedy="Declare the pair with Alias first.",
        )
    modules = [] if source.storage is None else list(source.storage.listeners)
    if len(modules) > 1:
        raise DeclarationError(
            "another module declares this tied weight too, to the layout it has",
            expected="a weight of one module",
            found=f"{len(modules)} modules that show it",
            remedy="Untie it with clone() before declaring, or declare it once.",
        )
    old = source.plan
    _, plan = plan_of(Alias(name, source.derived, layout, dtype=old.kernel.dtype), old.source)
    if not plan.reason.aliases or plan.capacity > old.capacity or plan.bound.regions != old.bound.regions:
        raise PointerError(
            f"this layout does not fit the storage: {plan.reason.value}",
            expected=f"{old.bound.regions} regions, at most {old.nbytes} bytes",
            found=f"{plan.bound.regions} regions, {plan.nbytes} bytes ({plan.kernel})",
            remedy="Plan room for it at creation: Alias(room_for=(layout,)).",
        )
    return replace(plan, capacity=old.capacity)
