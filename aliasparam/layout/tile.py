"""One tile of a layout as a picture: kernel memory, coloured by the row of the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import LayoutError
from ..svg import box, page, text
from .lines import bound, sized
from .pattern import Group, Line

#: Elements of kernel memory that are drawn at most, and elements that a tile may have to be looked at.
DRAWN, LARGEST = 1024, 1 << 18
_SIDE = 12


def tile_picture(name: str, lines: Sequence[Line], bits: int | None) -> str | None:
    """SVG of the smallest tensor that the layout takes whole, or None where that is larger than ``LARGEST`` elements.

    Cells are elements in the order of kernel memory, a line of cells a run of it. The hue is the row in the checkpoint, darker
    for columns further right; grey is padding. Of a large tile the first ``DRAWN`` elements are drawn.
    """
    shape = tile_shape(lines, bits)
    if shape is None:
        return None
    offsets = bound(lines, bits, _stored(shape, bits), torch.uint8).offsets().reshape(shape)
    kernel = sized(lines, shape)[-1]
    capacity = kernel.capacity
    source = torch.full((capacity,), -1, dtype=torch.int64)
    source[offsets.reshape(-1)] = torch.arange(offsets.numel())
    columns = shape[-1] if len(shape) > 1 else 1
    wide = _line(kernel.kernel_shape[-1], capacity)
    shown = source[:DRAWN]
    size = " × ".join(map(str, shape))
    more = f", the first {len(shown)} of {capacity} elements" if capacity > len(shown) else ""
    parts = [
        text(10, 18, name, "m"),
        text(10, 36, f"a tile of {size} in kernel memory, {wide} elements a line{more}; hue: row of the checkpoint", "s"),
        *_cells(shown, wide, columns, offsets.numel() // columns),
    ]
    return page(max(20 + wide * _SIDE, 640), 56 + math.ceil(len(shown) / wide) * _SIDE, f"A tile of {name}", parts)


def tile_shape(lines: Sequence[Line], bits: int | None) -> tuple[int, ...] | None:
    """The smallest shape that fills whole tiles: digits without a size count 1, or as little more as the layout takes."""
    sizes = dict(lines[0].sizes)
    for free in (1, 2, 4, 8, 16, 32, 64, 128):
        shape = tuple(math.prod(_extents(dim, sizes, free)) for dim in lines[0].shape_side.dims)
        if bits and shape[-1] % 2:
            continue
        if math.prod(shape) > LARGEST:
            return None
        try:
            if sized(lines, shape)[-1].capacity <= LARGEST:
                bound(lines, bits, _stored(shape, bits), torch.uint8)
                return shape
        except LayoutError:
            continue
    return None


def _stored(shape: tuple[int, ...], bits: int | None) -> tuple[int, ...]:
    """The shape in bytes of elements that are bytes, or nibbles."""
    return (*shape[:-1], shape[-1] // 2) if bits else shape


def _extents(dim: Group, sizes: dict[str, int], free: int) -> Iterator[int]:
    digits = list(dim.digits())
    alone = len(digits) == 1 and digits[0].name not in sizes
    yield from (max(free, 4) if alone else sizes.get(digit.name, free) for digit in digits)


def _line(last: int, capacity: int) -> int:
    """Elements a line: the last kernel dim where that makes a fair picture."""
    return last if 16 <= last <= 64 else min(32 if capacity > 256 else 16, capacity)


def _cells(source: Tensor, wide: int, columns: int, rows: int) -> Iterator[str]:
    values = source.tolist()
    for at, element in enumerate(values):
        y, x = divmod(at, wide)
        row, column = divmod(element, columns)
        light = 75 - 35 * column / max(columns - 1, 1)
        fill = "#ddd" if element < 0 else f"hsl({300 * row / max(rows, 1):.0f} 60% {light:.0f}%)"
        title = "padding" if element < 0 else f"row {row}, column {column} is element {at}"
        yield box(10 + x * _SIDE, 46 + y * _SIDE, _SIDE - 1, _SIDE - 1, fill, "").replace("/>", f"><title>{title}</title></rect>")
