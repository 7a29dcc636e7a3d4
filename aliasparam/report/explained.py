"""What is known of declared modules, as data, and in one line each."""

from __future__ import annotations

from dataclasses import dataclass

from .layers import size


@dataclass(frozen=True)
class ExplainedName:
    """One storage with its names.

    Attributes:
        source: the checkpoint name in its module.
        shown_as: paths of all its checkpoint names where there are several.
        spec: dtype and shape of the checkpoint tensor.
        kernel: the kernel name; None where there is none.
        kernel_spec: its dtype and shape.
        verdict: how they share memory, or why not, with the code of the reason.
        aliased: whether the kernel name lives in this storage.
        layout: the line, where one was declared.
        state: of the storage; "mixed" where regions differ, "on meta" where nothing is allocated.
        version: how often its content changed.
        regions: experts, or 1.
        allocated: bytes, of a copy too.
    """

    source: str
    shown_as: tuple[str, ...]
    spec: str
    kernel: str | None
    kernel_spec: str | None
    verdict: str
    aliased: bool
    layout: str | None
    state: str | None
    version: int | None
    regions: int
    allocated: int

    def __str__(self) -> str:
        target = f" -> {self.kernel}" if self.kernel else ""
        line = f"; {self.layout}" if self.layout else ""
        state = f"; {self.state}" if self.state else ""
        regions = f"; {self.regions} regions" if self.regions > 1 else ""
        shown = f"; shown as {', '.join(self.shown_as)}" if self.shown_as else ""
        return f"  {self.source}{target}: {self.verdict}; {size(self.allocated)}{line}{state}{regions}{shown}"


@dataclass(frozen=True)
class ExplainedDerivation:
    """A small tensor with memory of its own. ``current``: it was computed from what its sources hold now."""

    name: str
    sources: tuple[str, ...]
    spec: str
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
    names: tuple[ExplainedName, ...]
    derivations: tuple[ExplainedDerivation, ...]

    def __str__(self) -> str:
        about = [f"  {self.about}"] if self.about else []
        head = f"{self.path} ({self.kind}): {'ready' if self.ready else 'open'}"
        return "\n".join([head, *about, *map(str, self.names), *map(str, self.derivations)])
