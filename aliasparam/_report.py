"""What aliases what, what fell back to a copy and why, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ._registry import AliasRegistry, registries


@dataclass(frozen=True)
class MemoryRow:
    """Bytes of one source and its kernel format."""

    module: str
    source: str
    derived: str | None
    verdict: str
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
    """Bytes of every declared tensor of ``model``: one storage, against both formats kept apart."""
    rows: list[MemoryRow] = []
    derivations = 0
    for path, registry in registries(model):
        rows.extend(_rows(path or registry.label, registry))
        for derived in registry.derived.values():
            if derived.fallback is None:
                spec = derived.declaration
                count = 1
                for n in spec.shape:
                    count *= n
                derivations += count * spec.dtype.itemsize
    return MemoryReport(tuple(rows), derivations)


def _rows(path: str, registry: AliasRegistry) -> list[MemoryRow]:
    copies = {d.declaration.sources[0]: (n, d.fallback) for n, d in registry.derived.items() if d.fallback is not None}
    rows = []
    for source in registry.sources.values():
        plan = source.plan
        name, fallback = copies.get(source.name, (None, None))
        if fallback is not None:
            kernel = fallback.derived.nbytes
            verdict, aliased, allocated = f"copy: {fallback.reason.value}", False, plan.nbytes + kernel
        else:
            name = source.derived
            kernel = plan.derived.nbytes if name and not plan.transform.is_identity_for(plan.source) else 0
            verdict, aliased, allocated = f"alias: {plan.reason.value}", True, plan.nbytes
            if not name:
                verdict = "no kernel format"
            elif not kernel:
                verdict = "alias: kernel format is the checkpoint format"
        rows.append(MemoryRow(path, source.name, name, verdict, aliased, plan.source.nbytes, kernel, allocated))
    return rows


def explain(module: nn.Module) -> str:
    """What each declared name of ``module`` (and of modules in it) shares memory with, and why."""
    lines: list[str] = []
    paths = {id(m): path for path, m in module.named_modules()}
    for path, registry in registries(module):
        lines.append(f"{path or registry.label} ({type(registry.module).__name__}): {'ready' if registry.is_ready else 'stale'}")
        for source, row in zip(registry.sources.values(), _rows(path, registry), strict=True):
            state = "on meta" if source.storage is None else source.storage.state.value if source.storage.state else "mixed"
            names = ", ".join(f"{paths.get(id(b.module), '?')}.{b.name}" for b in source.bindings)
            shards = f"; shown as {names}" if len(source.bindings) > 1 else ""
            target = f" -> {row.derived}" if row.derived else ""
            lines.append(f"  {source.name}{target}: {row.verdict}; {row.allocated_bytes} bytes; holds {state}{shards}")
        for name, derived in registry.derived.items():
            if derived.fallback is None:
                fresh = "current" if name not in registry.stale_names() else "stale"
                lines.append(f"  {name} = f({', '.join(derived.declaration.sources)}): own memory; {fresh}")
    return "\n".join(lines) if lines else "no module here declares aliases"


def _size(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
