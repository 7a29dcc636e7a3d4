"""What each declared tensor shares memory with, why, in what order, and what it takes: a row each, by module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..module.names import ModuleNames
from ..module.planning import Source
from ..module.verdict import Reason, StoragePlan
from .layers import LayerMemory, layer_of, size


@dataclass(frozen=True)
class NameRow:
    """One storage with its names, or a kernel name of undeclared code.

    Attributes:
        module: path of the module.
        source: the checkpoint name in its module.
        derived: the kernel name; None where there is none.
        verdict: how they share memory, or why not.
        reason: the same for programs; None of a name without a kernel format.
        checkpoint_bytes, kernel_bytes: what each format takes where they are kept apart; 0 of what is counted in an earlier row.
        allocated_bytes: what there is.
        spec: dtype and shape of the checkpoint tensor.
        kernel_spec: those of the kernel name.
        shown_as: paths of all its checkpoint names where there are several.
        layout: the line, where one was declared.
        state: of the storage; "mixed" where regions differ, "on meta" where nothing is allocated.
        version: how often its content changed.
        regions: experts, or 1.
    """

    module: str
    source: str
    derived: str | None
    verdict: str
    reason: Reason | None
    checkpoint_bytes: int
    kernel_bytes: int
    allocated_bytes: int
    spec: str = ""
    kernel_spec: str = ""
    shown_as: tuple[str, ...] = ()
    layout: str | None = None
    state: str | None = None
    version: int | None = None
    regions: int = 1

    @property
    def aliased(self) -> bool:
        """Whether the kernel name, if there is one, lives in the source's storage."""
        return self.reason is None or self.reason.aliases

    @property
    def two_copies_bytes(self) -> int:
        """What keeping both formats apart would take."""
        return self.checkpoint_bytes + self.kernel_bytes

    @property
    def judged(self) -> str:
        """The verdict, with the code of the reason."""
        return f"{self.verdict} [{self.reason.code}]" if self.reason else self.verdict

    def as_memory(self) -> LayerMemory:
        """The row as a part of its layer."""
        copies = 0 if self.aliased else self.kernel_bytes
        held = min(self.checkpoint_bytes, self.allocated_bytes - copies)
        shared = held if self.aliased and self.derived is not None else 0
        padding, saved = self.allocated_bytes - copies - held, self.two_copies_bytes - self.allocated_bytes
        return LayerMemory(layer_of(self.module), shared, held - shared, padding, copies, saved)

    def __str__(self) -> str:
        facts = [self.judged, size(self.allocated_bytes), self.layout, self.state]
        facts += [f"{self.regions} regions"] if self.regions > 1 else []
        facts += [f"shown as {', '.join(self.shown_as)}"] if self.shown_as else []
        return f"  {self.source}{f' -> {self.derived}' if self.derived else ''}: {'; '.join(filter(None, facts))}"


@dataclass(frozen=True)
class ExplainedDerivation:
    """A small tensor with memory of its own. ``current``: it was computed from what its sources hold now."""

    name: str
    sources: tuple[str, ...]
    spec: str
    nbytes: int
    current: bool

    def __str__(self) -> str:
        return f"  {self.name} = f({', '.join(self.sources)}): own memory; {'current' if self.current else 'stale'}"


@dataclass(frozen=True)
class ExplainedModule:
    """One module which declared something."""

    path: str
    kind: str
    ready: bool
    about: str
    names: tuple[NameRow, ...]
    derivations: tuple[ExplainedDerivation, ...]

    @classmethod
    def of(cls, path: str, registry: ModuleNames, seen: set[int], paths: Mapping[int, str]) -> ExplainedModule:
        """``seen`` are storages that were counted, ``paths`` those of modules by their id."""
        stale = registry.stale_names()
        declared = [d.declaration for d in registry.derived.values() if d.fallback is None]
        derivations = (ExplainedDerivation(d.name, d.sources, str(d.spec), d.spec.nbytes, d.name not in stale) for d in declared)
        names = tuple(_rows(path, registry, seen, paths))
        return cls(path, type(registry.module).__name__, registry.is_ready, registry.about, names, tuple(derivations))

    def memory(self) -> Iterator[LayerMemory]:
        """All that it takes, as parts of its layer."""
        yield from (row.as_memory() for row in self.names)
        yield from (LayerMemory(layer_of(self.path), own=derivation.nbytes) for derivation in self.derivations)

    def __str__(self) -> str:
        about = [f"  {self.about}"] if self.about else []
        head = f"{self.path} ({self.kind}): {'ready' if self.ready else 'open'}"
        return "\n".join([head, *about, *map(str, self.names), *map(str, self.derivations)])


def _rows(path: str, registry: ModuleNames, seen: set[int], paths: Mapping[int, str]) -> Iterator[NameRow]:
    apart = [(d, d.declaration.sources[0], name, d.fallback) for name, d in registry.derived.items() if d.fallback is not None]
    copies = {source: (name, plan) for d, source, name, plan in apart if not d.is_undeclared}
    for source in registry.sources.values():
        yield _row(path, source, *copies.get(source.name, (source.derived, source.plan)), seen, paths)
    for d, read, name, plan in apart:
        if d.is_undeclared:
            yield NameRow(path, read, name, f"copy: {plan.reason.value}", plan.reason, 0, plan.kernel.nbytes, plan.kernel.nbytes)


def _row(path: str, source: Source, derived: str | None, pair: StoragePlan, seen: set[int], paths: Mapping[int, str]) -> NameRow:
    """``pair``: the plan of the kernel name ``derived``, which is the source's where it lives in its storage."""
    plan, storage, copied = source.plan, source.storage, derived != source.derived
    tied = storage is not None and id(storage) in seen
    seen.add(id(storage))
    held, allocated = (0, 0) if tied else (plan.source.nbytes, plan.nbytes)
    kernel = pair.kernel.nbytes if copied or (derived and not tied and not plan.bound.is_identity) else 0
    if copied:
        verdict = f"copy: {pair.reason.value}" + ("; tied to an earlier row" if tied else "")
    elif tied or not derived:
        verdict = "tied: the storage of an earlier row" if tied else "no kernel format"
    else:
        verdict = f"alias: {'kernel format is the checkpoint format' if plan.bound.is_identity else plan.reason.value}"
    shown = source.bindings if len(source.bindings) > 1 else ()
    return NameRow(
        *(path, source.name, derived, verdict, pair.reason if derived or tied else None),
        *(held, kernel, allocated + kernel if copied else allocated),
        spec=str(plan.source),
        kernel_spec=str(pair.kernel) if derived else "",
        shown_as=tuple(f"{paths.get(id(b.module), '?')}.{b.name}" for b in shown),
        layout=str(source.layout) if source.layout else None,
        state="on meta" if storage is None else storage.state.value if storage.state else "mixed",
        version=None if storage is None else storage.version,
        regions=plan.bound.regions,
    )
