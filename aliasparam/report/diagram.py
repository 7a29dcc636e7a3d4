"""Declared modules as a diagram: checkpoint name, storage, kernel name, in SVG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

from ..svg import arrow, box, clipped, page, text
from .layers import size
from .rows import ExplainedDerivation, ExplainedModule, NameRow

#: Where a column begins, and how wide it is: names of the checkpoint, storages, names of the kernel.
Column: TypeAlias = tuple[int, int]
_NAME, _STORAGE, _KERNEL = (20, 230), (290, 500), (820, 230)
_ROW, _GAP, _WIDTH = 62, 14, 1070
_READY, _OPEN, _ALIAS, _COPY, _SMALL = "#edf7ee", "#fbeee6", "#eef3f8", "#f8ecec", "#f5f5f5"
#: The lines of a box: the style of each, and pixels a letter.
_LINES = (("b", 7.4), ("m s", 6.7), ("s", 5.8))


def diagram(modules: Sequence[ExplainedModule], most: int | None = None) -> str:
    """One band a module: names of the checkpoint on the left, the storage in the middle, names of the kernel on the right."""
    shown = modules if most is None else modules[:most]
    parts: list[str] = []
    y = 16.0
    for module in shown:
        parts += _head(module, y)
        y += 24 + _GAP
        for name in module.names:
            parts += _name(name, y)
            y += _ROW + _GAP
        for derivation in module.derivations:
            parts += _derivation(derivation, y)
            y += 40 + _GAP
    rest = len(modules) - len(shown)
    if rest or not modules:
        parts.append(text(_NAME[0], y + 14, f"and {rest} more modules" if rest else "no module here declares aliases", "s"))
        y += 24
    return page(_WIDTH, y + 4, "Names, storages and layouts", parts)


def _head(module: ExplainedModule, y: float) -> Iterator[str]:
    state, fill = ("ready", _READY) if module.ready else ("open", _OPEN)
    yield box(12, y, _WIDTH - 24, 24, fill, 'rx="4"')
    yield text(_NAME[0], y + 16, clipped(f"{module.path} ({module.kind}): {state}", 90), "b")
    yield text(_WIDTH - 20, y + 16, clipped(module.about, 60), "s", "end")


def _name(name: NameRow, y: float) -> Iterator[str]:
    facts = [size(name.allocated_bytes), name.state, None if name.version is None else f"version {name.version}"]
    facts += [f"{name.regions} regions"] if name.regions > 1 else []
    fill = _ALIAS if name.aliased else _COPY
    line = name.layout or ("checkpoint order" if name.aliased else "")
    yield from _box(_NAME, y, _ALIAS, name.source, name.spec, f"{len(name.shown_as)} names" if name.shown_as else "")
    yield from _box(_STORAGE, y, fill, ", ".join(filter(None, facts)), line, name.judged)
    yield _arrow(_NAME, _STORAGE, y + _ROW / 2)
    if name.derived is not None:
        yield from _box(_KERNEL, y, fill, name.derived, name.kernel_spec, "" if name.aliased else "memory of its own")
        yield _arrow(_STORAGE, _KERNEL, y + _ROW / 2)


def _derivation(derivation: ExplainedDerivation, y: float) -> Iterator[str]:
    fresh = "current" if derivation.current else "stale"
    yield text(_STORAGE[0], y + 24, clipped(f"f({', '.join(derivation.sources)}), {fresh}", 60), "m s")
    yield _arrow((_STORAGE[0], _STORAGE[1] - 30), _KERNEL, y + 20)
    yield from _box(_KERNEL, y, _SMALL, derivation.name, derivation.spec, high=40)


def _box(column: Column, y: float, fill: str, *lines: str, high: int = _ROW) -> Iterator[str]:
    x, width = column
    yield box(x, y, width, high, fill, 'stroke="#2a78b8" rx="6"')
    for i, (words, (kind, letter)) in enumerate(zip(lines, _LINES, strict=False)):
        yield text(x + 10, y + 17 * i + (19 if high == _ROW else 17), clipped(words, int((width - 16) / letter)), kind)


def _arrow(start: Column, end: Column, y: float) -> str:
    return arrow((sum(start), y), (end[0] - 2, y))
