"""Rectangles of a checkpoint tensor as strided pieces of kernel memory.

A :class:`Piece` is an N-D block that has constant strides in both orders. A rectangle that cuts no digit is one piece; every
digit that it cuts, and every ragged end, adds at most two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..host import HOST
from .digits import Axis, BoundLine
from .digits import row_major as row_major

#: (start, stop) for each dim.
Box: TypeAlias = tuple[tuple[int, int], ...]


class Piece(NamedTuple):
    """Elements ``value + sum(i * axis.value)`` of a rectangle, at ``kernel + sum(i * axis.kernel)`` of the memory."""

    kernel: int
    value: int
    axes: Sequence[Axis]


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
        found = [routed for piece in found for routed in _route(piece, line.start, line.digits)]
    return found


def whole(shape: Sequence[int]) -> Box:
    return tuple((0, size) for size in shape)


def part_in(part: Box, box: Box) -> tuple[slice, ...]:
    """The index of ``part``, which lies in ``box``, among values of ``box``."""
    return tuple(slice(start - first, stop - first) for (start, stop), (first, _) in zip(part, box, strict=True))


def within(box: Box, shape: Sequence[int]) -> bool:
    return len(box) == len(shape) and all(0 <= start <= stop <= size for (start, stop), size in zip(box, shape, strict=True))


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


def _route(piece: Piece, start: int, digits: Sequence[Axis]) -> Iterator[Piece]:
    """The pieces of one piece at positions of a line, after these were written in ``digits``. See [Note: place values]."""
    if not digits:
        yield piece._replace(kernel=start)
        return
    (_, kernel, value), *rest = digits
    for part in _divide(piece, value):
        routed = [a._replace(kernel=a.kernel // value * kernel) for a in part.axes if a.kernel % value == 0]
        low = Piece(part.kernel % value, part.value, [a for a in part.axes if a.kernel % value])
        for inner in _route(low, start + part.kernel // value * kernel, rest):
            yield inner._replace(axes=[*routed, *inner.axes])


def _divide(piece: Piece, value: int) -> Iterator[Piece]:
    """Split until positions are ``value`` times (some axes) plus a remainder (the others) that never reaches ``value``."""
    at, offset, axes = piece
    low = [a for a in axes if a.kernel % value]
    reach = sum((a.size - 1) * a.kernel for a in low)
    ascending = all(a.kernel > 0 for a in low)
    if not low or (ascending and at % value + reach < value):
        yield piece
        return
    cut = max(low, key=lambda a: abs(a.kernel))
    size, unit, step = cut
    others = [a for a in axes if a is not cut]
    if ascending and unit < value and value % unit == 0 and at % unit + reach - (size - 1) * unit < unit:
        period = value // unit  # whole blocks of so many steps, and what is before and after them
        head = min(-(at // unit) % period, size)
        blocks, tail = divmod(size - head, period)
        cuts = [(0, 1, head), (head, blocks, period), (size - tail, 1, tail)]
    else:
        cuts = [(i, 1, 1) for i in range(size)]
    for first, blocks, run in cuts:
        if not blocks or not run:
            continue
        parts = [a for a in (Axis(blocks, unit * run, step * run), Axis(run, unit, step)) if a.size > 1]
        yield from _divide(Piece(at + first * unit, offset + first * step, [*others, *parts]), value)
