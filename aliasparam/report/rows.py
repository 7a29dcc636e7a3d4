"""What each declared tensor shares memory with, why, and what it takes: a row each."""

from __future__ import annotations

from dataclasses import dataclass

from ..module.names import ModuleNames
from ..module.planning import Source
from ..module.verdict import Reason, StoragePlan
from .layers import LayerMemory, layer_of


@dataclass(frozen=True)
class MemoryRow:
    """Bytes of one source and its kernel format."""

    module: str
    source: str
    derived: str | None
    verdict: str
    reason: Reason | None
    aliased: bool
    checkpoint_bytes: int
    kernel_bytes: int
    allocated_bytes: int

    @property
    def two_copies_bytes(self) -> int:
        """What keeping both formats apart would take."""
        return self.checkpoint_bytes + self.kernel_bytes

    def as_memory(self) -> LayerMemory:
        """The row as a part of its layer."""
        layer, saved = layer_of(self.module), self.two_copies_bytes - self.allocated_bytes
        if not self.aliased:
            held = self.allocated_bytes - self.kernel_bytes
            return LayerMemory(layer, own=held, copies=self.kernel_bytes, saved=saved)
        padding = self.allocated_bytes - self.checkpoint_bytes
        if self.derived is None:
            return LayerMemory(layer, own=self.checkpoint_bytes, padding=padding, saved=saved)
        return LayerMemory(layer, shared=self.checkpoint_bytes, padding=padding, saved=saved)


def rows_of(path: str, registry: ModuleNames, seen: set[int]) -> list[MemoryRow]:
    copies = {d.declaration.sources[0]: (n, d.fallback) for n, d in registry.derived.items() if d.fallback is not None}
    rows = [_row(path, source, seen, *copies.get(source.name, (None, None))) for source in registry.sources.values()]
    for name, separate in registry.separate.items():
        count, verdict = separate.nbytes, f"copy: {separate.reason.value}"
        rows.append(MemoryRow(path, separate.source, name, verdict, separate.reason, False, 0, count, count))
    return rows


def _row(path: str, source: Source, seen: set[int], copy: str | None, fallback: StoragePlan | None) -> MemoryRow:
    plan = source.plan
    tied = id(source.storage) in seen if source.storage is not None else False
    if source.storage is not None:
        seen.add(id(source.storage))
    held, capacity = (0, 0) if tied else (plan.source.nbytes, plan.nbytes)
    if fallback is not None:
        kernel = fallback.kernel.nbytes
        verdict = f"copy: {fallback.reason.value}" + ("; tied to an earlier row" if tied else "")
        return MemoryRow(path, source.name, copy, verdict, fallback.reason, False, held, kernel, capacity + kernel)
    if tied:
        return MemoryRow(path, source.name, source.derived, "tied: the storage of an earlier row", plan.reason, True, 0, 0, 0)
    if not source.derived:
        return MemoryRow(path, source.name, None, "no kernel format", None, True, held, 0, plan.nbytes)
    if plan.bound.is_identity:
        verdict = "alias: kernel format is the checkpoint format"
        return MemoryRow(path, source.name, source.derived, verdict, plan.reason, True, held, 0, plan.nbytes)
    verdict = f"alias: {plan.reason.value}"
    return MemoryRow(path, source.name, source.derived, verdict, plan.reason, True, held, plan.kernel.nbytes, plan.nbytes)
