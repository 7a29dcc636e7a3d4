"""What is known of declared modules, looked up; and the text, data and drawing of it."""

from __future__ import annotations

from collections.abc import Iterable

from ..module.names import ModuleNames
from ..module.planning import Source
from ..spec import TensorSpec
from .diagram import diagram
from .explained import ExplainedDerivation, ExplainedModule, ExplainedName
from .rows import MemoryRow, rows_of

#: Modules that a notebook draws; the rest is one line.
SHOWN = 12


class Explanation(str):
    """The text of :func:`~aliasparam.explain`; ``modules`` holds what it says as data."""

    modules: tuple[ExplainedModule, ...] = ()

    @classmethod
    def of(cls, modules: Iterable[ExplainedModule]) -> Explanation:
        found = tuple(modules)
        text = cls("\n".join(map(str, found)) or "no module here declares aliases")
        text.modules = found
        return text

    def picture(self, most: int | None = None) -> str:
        """SVG, which needs no package: each storage between its checkpoint names and its kernel name, with line, state, version.

        Args:
            most: modules to draw, None for all; the picture says how many it left out.
        """
        return diagram(self.modules, most)

    def _repr_html_(self) -> str:
        return self.picture(SHOWN)


def explained(path: str, registry: ModuleNames, about: str, seen: set[int], paths: dict[int, str]) -> ExplainedModule:
    """One module: ``seen`` are storages that were counted, ``paths`` those of modules by their id."""
    stale = registry.stale_names()
    own = ((name, d.declaration) for name, d in registry.derived.items() if d.fallback is None)
    return ExplainedModule(
        path,
        type(registry.module).__name__,
        registry.is_ready,
        about,
        tuple(_name(row, registry, paths) for row in rows_of(path, registry, seen)),
        tuple(ExplainedDerivation(n, d.sources, str(TensorSpec(d.shape, d.dtype)), n not in stale) for n, d in own),
    )


def _name(row: MemoryRow, registry: ModuleNames, paths: dict[int, str]) -> ExplainedName:
    known = registry.sources.get(row.source)
    verdict = f"{row.verdict} [{row.reason.code}]" if row.reason else row.verdict
    facts = (None, None, None, 1, ()) if known is None else _facts(known, paths)
    layout, state, version, regions, shown = facts
    copy = registry.derived.get(row.derived or "")
    plan = copy.fallback if copy is not None else known.plan if known is not None else None
    kernel = str(plan.kernel) if plan is not None and row.derived else None
    spec = str(known.plan.source) if known is not None else ""
    return ExplainedName(
        row.source, shown, spec, row.derived, kernel, verdict, row.aliased, layout, state, version, regions, row.allocated_bytes
    )


def _facts(source: Source, paths: dict[int, str]) -> tuple[str | None, str, int | None, int, tuple[str, ...]]:
    """Line, state, version, regions and, where there are several, the paths of a source's names."""
    storage, names = source.storage, source.bindings
    state = "on meta" if storage is None else storage.state.value if storage.state else "mixed"
    shown = tuple(f"{paths.get(id(b.module), '?')}.{b.name}" for b in names) if len(names) > 1 else ()
    layout = str(source.layout) if source.layout is not None else None
    return layout, state, storage.version if storage is not None else None, source.plan.bound.regions, shown
