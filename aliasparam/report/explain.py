"""`explain`: what each declared name shares memory with, why, in what order, and what it costs."""

from __future__ import annotations

from torch import nn

from ..module.planning import Source
from ..module.registry_of import registries
from .memory import rows_of, size


def explain(module: nn.Module) -> str:
    """What each declared name of ``module`` (and of modules in it) shares memory with, why, and what it costs."""
    lines: list[str] = []
    paths = {id(m): path for path, m in module.named_modules()}
    seen: set[int] = set()
    for path, registry in registries(module):
        lines.append(f"{path or registry.label} ({type(registry.module).__name__}): {'ready' if registry.is_ready else 'open'}")
        if registry.about:
            lines.append(f"  {registry.about}")
        for row in rows_of(path, registry, seen):
            code = f" [{row.reason.code}]" if row.reason else ""
            target = f" -> {row.derived}" if row.derived else ""
            known = registry.sources.get(row.source)
            about = _about(known, paths) if known is not None else ""
            lines.append(f"  {row.source}{target}: {row.verdict}{code}; {size(row.allocated_bytes)}{about}")
        for name, derived in registry.derived.items():
            if derived.fallback is None:
                fresh = "current" if name not in registry.stale_names() else "stale"
                lines.append(f"  {name} = f({', '.join(derived.declaration.sources)}): own memory; {fresh}")
    return "\n".join(lines) if lines else "no module here declares aliases"


def _about(source: Source, paths: dict[int, str]) -> str:
    """Layout, state, regions and shards of one source."""
    storage, bound = source.storage, source.plan.bound
    text = f"; {source.layout}" if source.layout is not None else ""
    text += "; on meta" if storage is None else f"; {storage.state.value if storage.state else 'mixed'}"
    if bound.regions > 1:
        text += f"; {bound.regions} regions"
    if len(source.bindings) > 1:
        text += f"; shown as {', '.join(f'{paths.get(id(b.module), chr(63))}.{b.name}' for b in source.bindings)}"
    return text
