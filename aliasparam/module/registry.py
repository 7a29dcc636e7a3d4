"""AliasRegistry: everything one module declared, and processing it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import DeclarationError, PointerError, StateError, foreign_code, located
from ..report.diagram import diagram
from ..report.rows import ExplainedModule
from ..storage.coverage import Coverage
from ..storage.locks import all_locked
from ..storage.storage import refuse_for_process
from ..tensors.faces import _Aliased, loader_attributes
from ..tensors.geometry import boxes_under, place_of, rows_under
from ..tensors.parameter import make_parameter
from .adopt import adopt, finish_moves
from .allocate import allocate, check_sources
from .declarations import Alias, AnyLayout, Declaration, Derivation, need_wellformed
from .derive import refresh
from .names import ModuleNames
from .planning import Binding, Derived, Source, in_order, nobody_declared, planned
from .verdict import StoragePlan, aliasing_is_on, plan_of

#: What a list of declarations asks for: every source with its Parameter, and what is derived.
Plan: TypeAlias = tuple[list[tuple[Source, Tensor]], list[Derived]]
#: What processing calls, with the registry.
Hook: TypeAlias = "Callable[[AliasRegistry], None]"


class AliasRegistry(ModuleNames):
    """The storages, names, layouts and derivations of one module. Made by :func:`declare`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        #: Called with the registry before anything is derived: whatever raises leaves all names as they were.
        self.checks: list[Hook] = []
        #: Called with the registry before the module runs with new weights, until they succeed: for caches that depend on them.
        self.on_processed: list[Hook] = []

    # -- declaring -----------------------------------------------------------------------------------------------------

    def planned(self, declarations: Sequence[Declaration], *, aliasing: bool) -> Plan:
        """What :meth:`add` is to carry out; every check is made here. Nothing changes."""
        with located(module=self.label):
            need_wellformed(declarations)
            taken = {*self.sources, *self.kernel_names()}
            sources, derived = planned(self.module, declarations, taken, aliasing=aliasing and aliasing_is_on())
            return check_sources(self, sources), derived

    def add(self, plan: Plan, *, loaded: bool, checks: Iterable[Hook] = (), on_processed: Iterable[Hook] = ()) -> None:
        """Carry out what was planned. Everything becomes declared at once, hooks too; where an interrupt came before, nothing is,
        it may be declared again, and names that have a storage by then keep it."""
        named, derived = plan
        hooks = {"checks": [*self.checks, *checks], "on_processed": [*self.on_processed, *on_processed]}
        self.open()
        for source, parameter in named:
            allocate(self, source, parameter, loaded=loaded)
        sources = {source.name: source for source, _ in named}
        new = {one.declaration.name: one for one in derived}
        self.__dict__.update(hooks, sources=self.sources | sources, derived=self.derived | new)
        self.bind(sources.values())  # as every verb does

    def rederive(self, derivations: Iterable[Derivation]) -> None:
        """Give derived names other formulas, in the memory they have; the next processing computes them anew, chains in order.

        Raises:
            DeclarationError: not a derived name, another shape or dtype, a source which was never declared, or a cycle. Nothing
                changes then.
        """
        with foreign_code("these are no derivations", DeclarationError, module=self.label, expected="Derivations in a list"):
            need_wellformed(given := list(derivations))
            new = {derivation.name: derivation for derivation in given}
        for derivation in new.values():
            old = self.derived.get(derivation.name)
            found = None if old is None else old.declaration.spec
            if old is None or old.fallback or found != derivation.spec:
                raise DeclarationError(
                    "only a derivation of the same shape and dtype can be computed otherwise",
                    module=self.label,
                    name=derivation.name,
                    expected=derivation.spec,
                    found=found,
                )
            if unknown := [n for n in derivation.sources if n not in self.sources and n not in self.owners]:
                raise DeclarationError("derived from names that are no sources here", module=self.label, name=", ".join(unknown))
        with located(module=self.label):
            others = [replace(self.derived[n], declaration=derivation, seen=None) for n, derivation in new.items()]
            kept = [one for n, one in self.derived.items() if n not in new]
            derived = {one.declaration.name: one for one in in_order([*kept, *others])}
        aliased = {n: owner for n, owner in self.owners.items() if n not in derived}
        self.open()
        self.__dict__.update(derived=derived, owners=aliased | derived)  # at once: each in the order in which it is computed

    def retarget(self, layouts: Mapping[str, AnyLayout | str | None]) -> None:
        """Bring sources into another order, in place, by blocks that both orders keep together.

        Names, addresses and capacities stay; the shape of a kernel name may change. Nothing changes if any layout does not fit.

        Raises:
            DeclarationError: not a source with an aliased kernel name, or a layout that does not fit its shape.
            PointerError: the new layout needs more memory than was planned (``Alias(room_for=...)``).
        """
        plans = self.check_retarget(layouts)
        with torch.no_grad():
            adopt(self)
            storages = [storage for name in plans if (storage := self.sources[name].storage) is not None]
            with all_locked(storage.lock_number for storage in storages):
                for storage in storages:
                    storage.need_writable()
                for storage in storages:
                    storage.changing()
                for name, plan in plans.items():
                    self.sources[name].plan = plan
                finish_moves(self)
            self.bind()

    def check_retarget(self, layouts: Mapping[str, AnyLayout | str | None]) -> dict[str, StoragePlan]:
        """Raise what :meth:`retarget` would raise, for whoever moves several modules or none; the plan of each source."""
        if not isinstance(layouts, Mapping):
            found = type(layouts).__name__
            raise DeclarationError("these are no layouts", module=self.label, expected="a mapping of sources", found=found)
        plans = {}
        for name, layout in layouts.items():
            with located(module=self.label, name=name):
                plans[name] = self._replanned(name, layout)
        return plans

    def _replanned(self, name: str, layout: AnyLayout | str | None) -> StoragePlan:
        """The plan of a source in another layout, in the memory it has."""
        source = self.sources.get(name)
        if source is None or not source.derived or source.undeclared:
            raise DeclarationError(
                "only a source with an aliased kernel name has a layout to change",
                expected="the name of an aliased source",
                found=f"aliased sources {sorted(s.name for s in self.sources.values() if s.derived and not s.undeclared)}",
                remedy="Declare the pair with Alias first: kernel bytes of undeclared code are in no known order.",
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
        plan = plan_of(Alias(name, source.derived, layout, dtype=old.kernel.dtype), old.source)
        if not plan.reason.aliases or plan.capacity > old.capacity or plan.bound.regions != old.bound.regions:
            raise PointerError(
                f"this layout does not fit the storage: {plan.reason.value}",
                expected=f"{old.bound.regions} regions, at most {old.nbytes} bytes",
                found=f"{plan.bound.regions} regions, {plan.nbytes} bytes ({plan.kernel})",
                remedy="Plan room for it at creation: Alias(room_for=(layout,)).",
            )
        return replace(plan, capacity=old.capacity)

    def show_shards(self, name: str, shards: Iterable[tuple[nn.Module, str, Tensor]]) -> None:
        """Show the storage of ``name`` as several names, each a view of it (the q, k and v of a fused projection).

        The fused name itself is taken off its module, so every byte has one checkpoint name and no state dict lists it twice.

        Args:
            name: the declared source.
            shards: (module, parameter name, view), where view is a slice or view of the source parameter.
        """
        expected = "a declared source, and (module, name, view) of each shard"
        with foreign_code("these are no shards of a source", DeclarationError, module=self.label, name=name, expected=expected):
            source = self.sources[name]
            bindings = _shown_as(source, shards)
        dict.pop(self.module._parameters, name, None)
        source.bindings = bindings
        self.bind([source])

    # -- processing ----------------------------------------------------------------------------------------------------

    def process(self) -> int:
        """Compute what derives from new values and let the module run; returns how many names were new.

        Raises:
            StateError: a source was not loaded whole. Nothing has changed then.
            AdoptionError: a foreign tensor under a declared name does not fit.
        """
        if self.is_untouched:
            return 0
        with located(module=self.label), torch.no_grad():
            self._need_no_reload()
            adopt(self)
            versions = self._versions()  # before they are judged: what is written meanwhile is not committed
            self.need_loaded()
            for check in self.checks:
                check(self)
            work = sum(version != self._committed.get(name) for name, version in versions.items())
            work += sum(refresh(self, name) for name, one in self.derived.items() if one.kernel is not None)
            for hook in self.on_processed if work else ():
                hook(self)  # while this fails the module is open, and the next processing calls it again
            self._commit(versions)
        return work

    def _need_no_reload(self) -> None:
        if self.session is not None:
            raise StateError(
                "cannot process: a reload of this module is open",
                expected="the reload committed or aborted first",
                found="a reload in progress",
                remedy="Leave its `with` block, which processes; or abort it.",
            )

    def need_loaded(self) -> None:
        """Raise StateError where a source lacks elements."""
        for source in self.sources.values():
            storage = source.need_storage("process")
            storage.need_unexposed("process")
            storage.need_memory()
            with storage.lock:
                storage.notice()
                if not source.is_loaded:
                    raise storage.not_loaded("cannot process") if storage.states.missing else nobody_declared(name=source.derived)
        for name in [n for n, one in self.derived.items() if one.is_undeclared and not self.is_current(n)]:
            nobody_declared(name=name)

    def _repr_html_(self) -> str:
        return diagram([ExplainedModule.of(self.label, self, set(), {})])

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for storage in self.storages():
            storage.listen(self)


ForkingPickler.register(AliasRegistry, refuse_for_process)

#: Where a declared module has its registry.
ATTRIBUTE = "_alias_registry"


def registry_of(module: nn.Module) -> AliasRegistry | None:
    """The registry of exactly this module, or None."""
    registry: AliasRegistry | None = module.__dict__.get(ATTRIBUTE)
    return registry


def need_model(model: object) -> None:
    """Raise DeclarationError where the model is none."""
    if not isinstance(model, nn.Module):
        raise DeclarationError(
            "this is no model", expected="an nn.Module", found=type(model).__name__, remedy="Give the model itself."
        )


def registries(model: nn.Module) -> list[tuple[str, AliasRegistry]]:
    """(module path, registry) of every declared module in ``model``; labels are refreshed to the paths.

    Raises:
        DeclarationError: the model is none.
    """
    need_model(model)
    found = []
    for path, module in model.named_modules():
        registry: AliasRegistry | None = module.__dict__.get(ATTRIBUTE)
        if registry is not None:
            if path and path != registry.label:
                registry.relabel(path)
            found.append((path, registry))
    return found


def _shown_as(source: Source, shards: Iterable[tuple[nn.Module, str, Tensor]]) -> list[Binding]:
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
        like = view if old is None else old
        bindings.append(Binding(module, shard_name, make_parameter(storage, geometry, type(like), loader_attributes(like))))
    if not once or not covered.whole:
        raise DeclarationError(
            "the shards must cover the source exactly once",
            expected=f"{source.plan.source.numel} elements, each in one shard",
            found="some elements twice" if not once else f"without {covered.missing()[:3]}",
            remedy="Slice the source into parts that lie beside each other.",
        )
    return bindings
