"""What is known of declared modules, as data, and in one line each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..module.names import ModuleNames
from ..spec import TensorSpec
from .rows import NameRow, rows_of


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
    names: tuple[NameRow, ...]
    derivations: tuple[ExplainedDerivation, ...]

    @classmethod
    def of(
        cls, path: str, registry: ModuleNames, about: str, seen: set[int], paths: Mapping[int, str] | None = None
    ) -> ExplainedModule:
        """``seen`` and ``paths`` as of :func:`rows_of`."""
        stale = registry.stale_names()
        own = [(n, d.declaration) for n, d in registry.derived.items() if d.fallback is None]
        derivations = [ExplainedDerivation(n, d.sources, str(TensorSpec(d.shape, d.dtype)), n not in stale) for n, d in own]
        kind, names = type(registry.module).__name__, rows_of(path, registry, seen, paths)
        return cls(path, kind, registry.is_ready, about, tuple(names), tuple(derivations))

    def __str__(self) -> str:
        about = [f"  {self.about}"] if self.about else []
        head = f"{self.path} ({self.kind}): {'ready' if self.ready else 'open'}"
        return "\n".join([head, *about, *map(str, self.names), *map(str, self.derivations)])
