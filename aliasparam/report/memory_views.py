"""A memory report as text, HTML and a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from .bars import Bar, bars
from .layers import PARTS, LayerMemory, size

COLUMNS = (*PARTS, "allocated", "saved")
#: Layers that a notebook shows; the rest is one line.
SHOWN = 200
_COLORS = {"shared": "#2a78b8", "own": "#8fb8d9", "padding": "#d1711f", "copies": "#b23b3b", "saved": "#d9d9d9"}


def as_table(layers: Iterable[LayerMemory], total: LayerMemory) -> str:
    """A line a layer, and the total."""
    rows = [*layers, total]
    width = max(8, *(len(row.layer) for row in rows)) + 2
    head = f"{'layer':<{width}}{''.join(f'{name:>13}' for name in COLUMNS)}"
    return "\n".join([head, *(f"{r.layer:<{width}}{''.join(f'{size(getattr(r, c)):>13}' for c in COLUMNS)}" for r in rows)])


def as_html(layers: Sequence[LayerMemory], total: LayerMemory) -> str:
    """The same as an HTML table, of at most ``SHOWN`` layers."""
    head = "".join(f'<th title="{PARTS.get(name, "")}">{name}</th>' for name in COLUMNS)
    shown = [_row(layer) for layer in layers[:SHOWN]]
    if len(layers) > SHOWN:
        shown.append(f'<tr><td colspan="{len(COLUMNS) + 1}">and {len(layers) - SHOWN} more layers</td></tr>')
    foot = _row(total).replace("td>", "th>")
    return f"<table><thead><tr><th>layer</th>{head}</tr></thead><tbody>{''.join(shown)}</tbody><tfoot>{foot}</tfoot></table>"


def _row(layer: LayerMemory) -> str:
    cells = "".join(f"<td>{size(getattr(layer, column))}</td>" for column in COLUMNS)
    return f"<tr><td>{escape(layer.layer)}</td>{cells}</tr>"


def as_picture(layers: Sequence[LayerMemory], total: LayerMemory, title: str) -> str:
    """Stacked bars as SVG: what is allocated, and above it what a second copy would add. Needs matplotlib.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    found = [
        Bar(f"{name}: {size(getattr(total, name))}", _COLORS[name], [getattr(layer, name) for layer in layers])
        for name in (*PARTS, "saved")
        if getattr(total, name)
    ]
    return bars([layer.layer for layer in layers], found, title=title, kind="svg").decode()
