"""Rectangles of a checkpoint tensor as strided pieces of kernel memory.

A :class:`Piece` is an N-D block that has constant strides in both orders. A rectangle that cuts no digit is one piece; every
digit that it cuts, and every ragged end, adds at most two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from operator import index
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..host import HOST
from .digits import Axis, BoundLine, routed
from .digits import Piece as Piece
from .digits import row_major as row_major

#: (start, stop) for each dim.
Box: TypeAlias = tuple[tuple[int, int], ...]


def pieces(lines: Sequence[BoundLine], shape: Sequence[int], box: Box, strides: Sequence[int]) -> list[Piece]:
    """``box`` (start and stop per dim of ``shape``) in the order that ``lines``, one after the other, give.

    ``strides``: of a tensor that holds the rectangle, whose elements ``Piece.value`` counts from the first on.
    """
    if any(stop <= start for start, stop in box):
        return []
    steps = row_major(shape)
    first = sum(start * step for (start, _), step in zip(box, steps, strict=True))
    axes = [Axis(*axis) for axis in zip(sizes(box), steps, strides, strict=True) if axis[0] > 1]
    found = [Piece(first, 0, axes)]
    for line in lines:
        found = [part for piece in found for part in routed(piece, line)]
    return found


def box_of(given: Any) -> Box:
    """``given`` as a box of whole numbers. Raises TypeError or ValueError where it is no (start, stop) for each of some dims."""
    return tuple((index(start), index(stop)) for start, stop in given)


def whole(shape: Sequence[int]) -> Box:
    return tuple((0, size) for size in shape)


def part_in(part: Box, box: Box) -> tuple[slice, ...]:
    """The index of ``part``, which lies in ``box``, among values of ``box``."""
    return tuple(slice(start - first, stop - first) for (start, stop), (first, _) in zip(part, box, strict=True))


def within(box: Box, shape: Sequence[int]) -> bool:
    return len(box) == len(shape) and all(0 <= start <= stop <= size for (start, stop), size in zip(box, shape, strict=True))


def box_in(given: Any, shape: Sequence[int]) -> Box | None:
    """``given``, of whatever kind, as a box within a tensor of this shape; None where it is none."""
    try:
        box = box_of(given)
    except (TypeError, ValueError):
        return None
    return box if within(box, shape) else None


def sizes(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def shown(box: Box) -> str:
    """As one writes an index: ``[0:2, 4:8]``."""
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"


def positions_in(shape: Sequence[int], box: Box) -> Tensor:
    """int64, the box's shape: the row-major position in ``shape`` of each of its elements."""
    found = torch.zeros((), dtype=torch.int64, device=HOST)
    for (start, stop), stride in zip(box, row_major(shape), strict=True):
        found = found[..., None] + torch.arange(start, stop, device=HOST) * stride
    return found


def tiles(box: Box, elements: int) -> Iterator[Box]:
    """``box`` cut along its first dims into boxes of at most ``elements`` elements."""
    shape = sizes(box)
    held = math.prod(shape)
    if held <= elements:  # most tensors are small
        yield from [box] if held else []
        return
    dim = next(dim for dim, size in enumerate(shape) if size > 1)
    start, stop = box[dim]
    many = max(1, shape[dim] * elements // held)
    for at in range(start, stop, many):
        yield from tiles((*box[:dim], (at, min(at + many, stop)), *box[dim + 1 :]), elements)
