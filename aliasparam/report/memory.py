"""What aliases what, what fell back to a copy and why, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ._convert import SCRATCH_BYTES, scratch_bytes
from ._planning import Source
from ._registry import AliasRegistry, registries
from ._transform import TensorSpec
from ._verdict import Reason, StoragePlan


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


@dataclass(frozen=True)
class MemoryReport:
    """One row per declared checkpoint tensor. Works on the meta device: it reads plans, not memory."""

    rows: tuple[MemoryRow, ...]
    derivation_bytes: int

    @property
    def allocated_bytes(self) -> int:
        return sum(r.allocated_bytes for r in self.rows) + self.derivation_bytes

    @property
    def two_copies_bytes(self) -> int:
        return sum(r.two_copies_bytes for r in self.rows) + self.derivation_bytes

    @property
    def saved_bytes(self) -> int:
        """What aliasing saves against keeping the checkpoint format beside the kernel format."""
        return self.two_copies_bytes - self.allocated_bytes

    @property
    def fallbacks(self) -> tuple[MemoryRow, ...]:
        return tuple(r for r in self.rows if r.derived and not r.aliased)

    def __str__(self) -> str:
        lines = [f"{'kernel name':<28}{'tensors':>8}{'one copy':>13}{'two copies':>13}  verdict"]
        groups: dict[tuple[str, str], list[MemoryRow]] = {}
        for row in self.rows:
            groups.setdefault((row.derived or "(checkpoint only)", row.verdict), []).append(row)
        for (derived, verdict), rows in groups.items():
            one, two = sum(r.allocated_bytes for r in rows), sum(r.two_copies_bytes for r in rows)
            lines.append(f"{derived:<28}{len(rows):>8}{_size(one):>13}{_size(two):>13}  {verdict}")
        lines.append(f"{'derivations':<28}{'':>8}{_size(self.derivation_bytes):>13}{_size(self.derivation_bytes):>13}")
        lines.append(f"{'total':<28}{'':>8}{_size(self.allocated_bytes):>13}{_size(self.two_copies_bytes):>13}")
        return "\n".join(lines)


def memory_report(model: nn.Module) -> MemoryReport:
    """Bytes of every declared tensor of ``model``: one storage, against both formats kept apart. Tied weights count once."""
    rows: list[MemoryRow] = []
    seen: set[int] = set()
    derivations = 0
    for path, registry in registries(model):
        rows.extend(_rows(path or registry.label, registry, seen))
        for derived in registry.derived.values():
            if derived.fallback is None:
                derivations += TensorSpec(derived.declaration.shape, derived.declaration.dtype).nbytes
    return MemoryReport(tuple(rows), derivations)


def _rows(path: str, registry: AliasRegistry, seen: set[int]) -> list[MemoryRow]:
    copies = {d.declaration.sources[0]: (n, d.fallback) for n, d in registry.derived.items() if d.fallback is not None}
    rows = [_row(path, source, seen, *copies.get(source.name, (None, None))) for source in registry.sources.values()]
    for name, separate in registry.separate.items():
        size, verdict = separate.nbytes, f"copy: {separate.reason.value}"
        rows.append(MemoryRow(path, separate.source, name, verdict, separate.reason, False, 0, size, size))
    return rows


def _row(path: str, source: Source, seen: set[int], copy: str | None, fallback: StoragePlan | None) -> MemoryRow:
    plan, size = source.plan, source.plan.source.nbytes
    tied = id(source.storage) in seen if source.storage is not None else False
    if source.storage is not None:
        seen.add(id(source.storage))
    size, capacity = (0, 0) if tied else (size, plan.nbytes)
    if fallback is not None:
        kernel = fallback.derived.nbytes
        verdict = f"copy: {fallback.reason.value}" + ("; tied to an earlier row" if tied else "")
        return MemoryRow(path, source.name, copy, verdict, fallback.reason, False, size, kernel, capacity + kernel)
    if tied:
        return MemoryRow(path, source.name, source.derived, "tied: the storage of an earlier row", plan.reason, True, 0, 0, 0)
    if not source.derived:
        return MemoryRow(path, source.name, None, "no kernel format", None, True, size, 0, plan.nbytes)
    if plan.transform.is_identity_for(plan.source):
        verdict = "alias: kernel format is the checkpoint format"
        return MemoryRow(path, source.name, source.derived, verdict, plan.reason, True, size, 0, plan.nbytes)
    verdict = f"alias: {plan.reason.value}"
    return MemoryRow(path, source.name, source.derived, verdict, plan.reason, True, size, plan.derived.nbytes, plan.nbytes)


def explain(module: nn.Module) -> str:
    """What each declared name of ``module`` (and of modules in it) shares memory with, why, and what it costs."""
    lines: list[str] = []
    paths = {id(m): path for path, m in module.named_modules()}
    seen: set[int] = set()
    for path, registry in registries(module):
        lines.append(f"{path or registry.label} ({type(registry.module).__name__}): {'ready' if registry.is_ready else 'stale'}")
        if registry.about:
            lines.append(f"  {registry.about}")
        for row in _rows(path, registry, seen):
            code = f" [{row.reason.code}]" if row.reason else ""
            target = f" -> {row.derived}" if row.derived else ""
            known = registry.sources.get(row.source)
            about = _about(known, paths) if known is not None else ""
            lines.append(f"  {row.source}{target}: {row.verdict}{code}; {_size(row.allocated_bytes)}{about}")
        for name, derived in registry.derived.items():
            if derived.fallback is None:
                fresh = "current" if name not in registry.stale_names() else "stale"
                lines.append(f"  {name} = f({', '.join(derived.declaration.sources)}): own memory; {fresh}")
    return "\n".join(lines) if lines else "no module here declares aliases"


def _about(source: Source, paths: dict[int, str]) -> str:
    """State, regions, scratch and shards of one source."""
    storage = source.storage
    held = "on meta" if storage is None else storage.state.value if storage.state else "mixed"
    text = f"; holds {held}"
    if source.plan.regions > 1:
        text += f"; {source.plan.regions} regions"
    if (scratch := scratch_bytes(source.plan)) > SCRATCH_BYTES:
        text += f"; converts as a whole, scratch up to {_size(scratch)}"
    if len(source.bindings) > 1:
        text += f"; shown as {', '.join(f'{paths.get(id(b.module), chr(63))}.{b.name}' for b in source.bindings)}"
    return text


def _size(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
