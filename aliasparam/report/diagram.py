"""Declared modules as a diagram: checkpoint name, storage, kernel name, in SVG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..svg import arrow, box, clipped, page, text
from .explained import ExplainedDerivation, ExplainedModule, ExplainedName
from .layers import size

#: Where the three columns begin, and how wide each is.
_NAME, _STORAGE, _KERNEL, _WIDE = 20, 290, 820, 230
_STORAGE_WIDE, _ROW, _GAP = 500, 62, 14
_WIDTH = _KERNEL + _WIDE + 20
_READY, _OPEN, _ALIAS, _COPY, _SMALL = "#edf7ee", "#fbeee6", "#eef3f8", "#f8ecec", "#f5f5f5"


def diagram(modules: Sequence[ExplainedModule], most: int | None = None) -> str:
    """One band a module: names of the checkpoint on the left, the storage in the middle, names of the kernel on the right."""
    shown = modules if most is None else modules[:most]
    parts: list[str] = []
    y = 16.0
    for module in shown:
        y = _module(module, y, parts)
    rest = len(modules) - len(shown)
    if rest or not modules:
        parts.append(text(_NAME, y + 14, f"and {rest} more modules" if rest else "no module here declares aliases", "s"))
        y += 24
    return page(_WIDTH, y + 4, "Names, storages and layouts", parts)


def _module(module: ExplainedModule, y: float, parts: list[str]) -> float:
    state, fill = ("ready", _READY) if module.ready else ("open", _OPEN)
    parts += [
        box(_NAME - 8, y, _WIDTH - 24, 24, fill, 'rx="4"'),
        text(_NAME, y + 16, clipped(f"{module.path} ({module.kind}): {state}", 90), "b"),
        text(_WIDTH - 20, y + 16, clipped(module.about, 60), "s", "end"),
    ]
    y += 24 + _GAP
    for name in module.names:
        parts += _name(name, y)
        y += _ROW + _GAP
    for derivation in module.derivations:
        parts += _derivation(derivation, y)
        y += 40 + _GAP
    return y


def _name(name: ExplainedName, y: float) -> Iterator[str]:
    middle = y + _ROW / 2
    yield from _box(_NAME, y, _WIDE, _ALIAS, name.source, name.spec, f"{len(name.shown_as)} names" if name.shown_as else "")
    facts = [size(name.allocated), *([name.state] if name.state else [])]
    facts += [f"version {name.version}"] if name.version is not None else []
    facts += [f"{name.regions} regions"] if name.regions > 1 else []
    line = name.layout or ("checkpoint order" if name.aliased else "")
    fill = _ALIAS if name.aliased else _COPY
    yield from _box(_STORAGE, y, _STORAGE_WIDE, fill, ", ".join(facts), line, name.verdict)
    yield arrow((_NAME + _WIDE, middle), (_STORAGE - 2, middle))
    if name.kernel is not None:
        yield from _box(_KERNEL, y, _WIDE, fill, name.kernel, name.kernel_spec or "", "" if name.aliased else "memory of its own")
        yield arrow((_STORAGE + _STORAGE_WIDE, middle), (_KERNEL - 2, middle))


def _box(x: float, y: float, width: float, fill: str, *lines: str) -> Iterator[str]:
    yield box(x, y, width, _ROW, fill, 'stroke="#2a78b8" rx="6"')
    for i, (words, kind) in enumerate(zip(lines, ("b", "m s", "s"), strict=False)):
        yield text(
            x + 10,
            y + 19 + 17 * i,
            clipped(words, int((width - 16) / (6.7 if kind == "m s" else 7.4 if kind == "b" else 5.8))),
            kind,
        )


def _derivation(derivation: ExplainedDerivation, y: float) -> Iterator[str]:
    fresh = "current" if derivation.current else "stale"
    yield text(_STORAGE, y + 24, clipped(f"f({', '.join(derivation.sources)}), {fresh}", 60), "m s")
    yield arrow((_STORAGE + _STORAGE_WIDE - 30, y + 20), (_KERNEL - 2, y + 20))
    yield box(_KERNEL, y, _WIDE, 40, _SMALL, 'stroke="#888" rx="6"')
    yield text(_KERNEL + 10, y + 17, clipped(derivation.name, 32), "b")
    yield text(_KERNEL + 10, y + 33, clipped(derivation.spec, 38), "m s")
