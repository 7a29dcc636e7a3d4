"""What is known of declared modules, looked up; and the text, data and drawing of it."""

from __future__ import annotations

from collections.abc import Iterable

from ..module.names import ModuleNames
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
    source, copy = registry.sources.get(row.source), registry.derived.get(row.derived or "")
    storage = source.storage if source else None
    plan = copy.fallback if copy else source.plan if source else None
    shown = source.bindings if source and len(source.bindings) > 1 else ()
    return ExplainedName(
        source=row.source,
        shown_as=tuple(f"{paths.get(id(b.module), '?')}.{b.name}" for b in shown),
        spec=str(source.plan.source) if source else "",
        kernel=row.derived,
        kernel_spec=str(plan.kernel) if plan and row.derived else None,
        verdict=f"{row.verdict} [{row.reason.code}]" if row.reason else row.verdict,
        aliased=row.aliased,
        layout=str(source.layout) if source and source.layout else None,
        state=(storage.state.value if storage.state else "mixed") if storage else "on meta" if source else None,
        version=storage.version if storage else None,
        regions=source.plan.bound.regions if source else 1,
        allocated=row.allocated_bytes,
    )
