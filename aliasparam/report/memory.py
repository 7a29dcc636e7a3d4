"""What aliases what, what fell back to a copy and why, and what it costs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import reduce

from torch import nn

from ..module.registry import registries
from ..spec import TensorSpec
from .layers import LayerMemory, layer_of, size
from .memory_views import as_html, as_picture, as_table
from .rows import NameRow, rows_of


@dataclass(frozen=True)
class MemoryReport:
    """One row per declared checkpoint tensor. Works on the meta device: it reads plans, not memory.

    Printing it gives a line a kernel name; a notebook shows a line a layer.

    Attributes:
        rows: the declared tensors.
        derivations: (module, bytes) of what its derivations take.
    """

    rows: tuple[NameRow, ...]
    derivations: tuple[tuple[str, int], ...]

    @property
    def derivation_bytes(self) -> int:
        return sum(count for _, count in self.derivations)

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
    def fallbacks(self) -> tuple[NameRow, ...]:
        return tuple(r for r in self.rows if r.derived and not r.aliased)

    @property
    def layers(self) -> tuple[LayerMemory, ...]:
        """Bytes of every layer, in the model's order. A layer is a module's path up to its first number (``model.layers.3``)."""
        found: dict[str, LayerMemory] = {}
        derived = (LayerMemory(layer_of(module), own=count) for module, count in self.derivations)
        for part in (*(row.as_memory() for row in self.rows), *derived):
            found[part.layer] = found.get(part.layer, LayerMemory(part.layer)).plus(part)
        return tuple(found.values())

    @property
    def total(self) -> LayerMemory:
        """Bytes of all layers."""
        return reduce(LayerMemory.plus, self.layers, LayerMemory("total"))

    def table(self) -> str:
        """Text: a line a layer (shared, own, padding, copies, allocated, saved), and the total."""
        return as_table(self.layers, self.total)

    def to_json(self) -> str:
        """``{"layers": [...], "total": {...}}`` with the columns of :meth:`table`, in bytes."""
        return json.dumps({"layers": [layer.as_dict() for layer in self.layers], "total": self.total.as_dict()}, indent=2)

    def picture(self, title: str = "weights in one copy, and what a second would add") -> str:
        """SVG: a bar a layer. Needs matplotlib.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        return as_picture(self.layers, self.total, title)

    def _repr_html_(self) -> str:
        return as_html(self.layers, self.total)

    def __str__(self) -> str:
        lines = [f"{'kernel name':<28}{'tensors':>8}{'one copy':>13}{'two copies':>13}  verdict"]
        groups: dict[tuple[str, str], list[NameRow]] = {}
        for row in self.rows:
            groups.setdefault((row.derived or "(checkpoint only)", row.verdict), []).append(row)
        for (derived, verdict), rows in groups.items():
            one, two = sum(r.allocated_bytes for r in rows), sum(r.two_copies_bytes for r in rows)
            lines.append(f"{derived:<28}{len(rows):>8}{size(one):>13}{size(two):>13}  {verdict}")
        lines.append(f"{'derivations':<28}{'':>8}{size(self.derivation_bytes):>13}{size(self.derivation_bytes):>13}")
        lines.append(f"{'total':<28}{'':>8}{size(self.allocated_bytes):>13}{size(self.two_copies_bytes):>13}")
        return "\n".join(lines)


def memory_report(model: nn.Module) -> MemoryReport:
    """Bytes of every declared tensor of ``model``: one storage, against both formats kept apart. Tied weights count once."""
    rows: list[NameRow] = []
    seen: set[int] = set()
    derivations: list[tuple[str, int]] = []
    for path, registry in registries(model):
        rows.extend(rows_of(path or registry.label, registry, seen))
        own = (d.declaration for d in registry.derived.values() if d.fallback is None)
        derivations += [(path or registry.label, TensorSpec(d.shape, d.dtype).nbytes) for d in own]
    return MemoryReport(tuple(rows), tuple(derivations))
