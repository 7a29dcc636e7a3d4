"""What aliases what, what fell back to a copy and why, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from html import escape

from torch import nn

from .bars import Bar, bars
from .explain import explain
from .layers import PARTS, LayerMemory, size
from .rows import ExplainedModule, NameRow

COLUMNS = (*PARTS, "allocated", "saved")
#: Layers that a notebook shows; the rest is one line.
SHOWN = 200
_COLORS = {"shared": "#2a78b8", "own": "#8fb8d9", "padding": "#d1711f", "copies": "#b23b3b", "saved": "#d9d9d9"}


@dataclass(frozen=True)
class MemoryReport:
    """One row per declared checkpoint tensor. Works on the meta device: it reads plans, not memory.

    Printing it gives a line a kernel name; a notebook shows a line a layer.

    Attributes:
        modules: what declared something.
    """

    modules: tuple[ExplainedModule, ...]

    @property
    def rows(self) -> tuple[NameRow, ...]:
        """The declared tensors."""
        return tuple(row for module in self.modules for row in module.names)

    @property
    def allocated_bytes(self) -> int:
        return self.total.allocated

    @property
    def two_copies_bytes(self) -> int:
        return self.allocated_bytes + self.saved_bytes

    @property
    def saved_bytes(self) -> int:
        """What aliasing saves against keeping the checkpoint format beside the kernel format."""
        return self.total.saved

    @property
    def fallbacks(self) -> tuple[NameRow, ...]:
        return tuple(r for r in self.rows if r.derived and not r.aliased)

    @property
    def layers(self) -> tuple[LayerMemory, ...]:
        """Bytes of every layer, in the model's order. A layer is a module's path up to its first number (``model.layers.3``)."""
        found: dict[str, LayerMemory] = {}
        for module in self.modules:
            for part in module.memory():
                found[part.layer] = found.get(part.layer, LayerMemory(part.layer)).plus(part)
        return tuple(found.values())

    @property
    def total(self) -> LayerMemory:
        """Bytes of all layers."""
        return reduce(LayerMemory.plus, self.layers, LayerMemory("total"))

    def table(self) -> str:
        """Text: a line a layer (shared, own, padding, copies, allocated, saved), and the total."""
        return "\n".join(_lines([("layer", *COLUMNS), *map(_cells, (*self.layers, self.total))]))

    def to_json(self) -> str:
        """``{"layers": [...], "total": {...}}`` with the columns of :meth:`table`, in bytes."""
        return json.dumps({"layers": [layer.as_dict() for layer in self.layers], "total": self.total.as_dict()}, indent=2)

    def picture(self, title: str = "weights in one copy, and what a second would add") -> str:
        """SVG: a bar a layer, what is allocated, and above it what a second copy would add. Needs matplotlib.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        layers, total = self.layers, self.total.as_dict()
        parts = [(name, [getattr(layer, name) for layer in layers]) for name in (*PARTS, "saved") if total[name]]
        found = [Bar(f"{name}: {size(sum(counts))}", _COLORS[name], counts) for name, counts in parts]
        return bars([layer.layer for layer in layers], found, title=title, kind="svg").decode()

    def _repr_html_(self) -> str:
        layers = self.layers
        head = "".join(f'<th title="{PARTS.get(name, "")}">{name}</th>' for name in COLUMNS)
        body = [_html(_cells(layer), "td") for layer in layers[:SHOWN]]
        if len(layers) > SHOWN:
            body.append(f'<tr><td colspan="{len(COLUMNS) + 1}">and {len(layers) - SHOWN} more layers</td></tr>')
        foot = _html(_cells(self.total), "th")
        return f"<table><thead><tr><th>layer</th>{head}</tr></thead><tbody>{''.join(body)}</tbody><tfoot>{foot}</tfoot></table>"

    def __str__(self) -> str:
        groups: dict[tuple[str, str], list[NameRow]] = {}
        for row in self.rows:
            groups.setdefault((row.derived or "(checkpoint only)", row.verdict), []).append(row)
        derivations = size(sum(one.nbytes for module in self.modules for one in module.derivations))
        cells = [["kernel name", "tensors", "one copy", "two copies"]]
        for (derived, _), rows in groups.items():
            one, two = sum(r.allocated_bytes for r in rows), sum(r.two_copies_bytes for r in rows)
            cells.append([derived, str(len(rows)), size(one), size(two)])
        cells.append(["derivations", "", derivations, derivations])
        cells.append(["total", "", size(self.allocated_bytes), size(self.two_copies_bytes)])
        verdicts = ["verdict", *(verdict for _, verdict in groups), "", ""]
        return "\n".join(f"{line}  {verdict}".rstrip() for line, verdict in zip(_lines(cells), verdicts, strict=True))


def _cells(layer: LayerMemory) -> tuple[str, ...]:
    return layer.layer, *(size(getattr(layer, column)) for column in COLUMNS)


def _html(cells: Iterable[str], kind: str) -> str:
    return f"<tr>{''.join(f'<{kind}>{escape(cell)}</{kind}>' for cell in cells)}</tr>"


def _lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows of a table as text: the first column from the left, the others from the right."""
    width = max(8, *(len(first) for first, *_ in rows)) + 2
    return [f"{first:<{width}}{''.join(f'{cell:>13}' for cell in cells)}" for first, *cells in rows]


def memory_report(model: nn.Module) -> MemoryReport:
    """Bytes of every declared tensor of ``model``: one storage, against both formats kept apart. Tied weights count once."""
    return MemoryReport(explain(model).modules)
