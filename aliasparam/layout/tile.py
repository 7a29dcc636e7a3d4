"""One tile of a layout as a picture: kernel memory, coloured by the row of the checkpoint."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch

from ..errors import LayoutError
from ..host import HOST
from ..svg import box, page, text
from .bound import BoundLayout
from .digits import bind_lines
from .pattern import Line
from .strided import StridedLayout

#: Elements of kernel memory that are drawn at most, and elements that a tile may have to be looked at.
DRAWN, LARGEST = 1024, 1 << 18
_SIDE = 12


def tile_picture(name: str, lines: Sequence[Line]) -> str | None:
    """SVG of the smallest tensor that the layout takes whole, or None where that is larger than ``LARGEST`` elements.

    Cells are elements in the order of kernel memory, a line of cells a run of it. The hue is the row in the checkpoint, darker
    for columns further right; grey is padding. Of a large tile the first ``DRAWN`` elements are drawn.
    """
    tile = _tile(lines)
    if tile is None:
        return None
    offsets, capacity, last = tile.offsets(), tile.region_capacity, tile.kernel_shape[-1]
    of = offsets.new_full((capacity,), -1).scatter_(0, offsets.view(-1), torch.arange(offsets.numel(), device=HOST))
    source = of[:DRAWN].tolist()
    columns = offsets.shape[-1] if offsets.dim() > 1 else 1
    wide = last if 16 <= last <= 64 else min(32 if capacity > 256 else 16, capacity)
    size = " × ".join(map(str, offsets.shape))
    more = f", the first {DRAWN} of {capacity} elements" if capacity > DRAWN else ""
    parts = [
        text(10, 18, name, "m"),
        text(10, 36, f"a tile of {size} in kernel memory, {wide} elements a line{more}; hue: row of the checkpoint", "s"),
        *_cells(source, wide, columns, offsets.numel() // columns),
    ]
    return page(max(20 + wide * _SIDE, 640), 56 + math.ceil(len(source) / wide) * _SIDE, f"A tile of {name}", parts)


def _tile(lines: Sequence[Line]) -> BoundLayout | None:
    """For the smallest shape that fills whole tiles: digits without a size count 1, or as little more as the lines take."""
    sizes = dict(lines[0].sizes)
    for free in (1, 2, 4, 8, 16, 32, 64, 128):
        digits = [dim.digits() for dim in lines[0].shape_side.dims]
        shape = tuple(math.prod(sizes.get(d, max(free, 4) if len(dim) == 1 else free) for d in dim) for dim in digits)
        if math.prod(shape) > LARGEST:
            return None
        with contextlib.suppress(LayoutError):
            bound = bind_lines(lines, shape)
            if bound[-1].capacity <= LARGEST:
                return StridedLayout(bound, shape, 0, torch.uint8)
    return None


def _cells(source: list[int], wide: int, columns: int, rows: int) -> Iterator[str]:
    for at, element in enumerate(source):
        y, x = divmod(at, wide)
        row, column = divmod(element, columns)
        light = 75 - 35 * column / max(columns - 1, 1)
        fill = "#ddd" if element < 0 else f"hsl({300 * row / max(rows, 1):.0f} 60% {light:.0f}%)"
        title = "padding" if element < 0 else f"row {row}, column {column} is element {at}"
        yield box(10 + x * _SIDE, 46 + y * _SIDE, _SIDE - 1, _SIDE - 1, fill, "").replace("/>", f"><title>{title}</title></rect>")
