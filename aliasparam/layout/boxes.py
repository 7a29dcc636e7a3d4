"""Rectangles of a checkpoint tensor as strided pieces of kernel memory.

A :class:`Piece` is an N-D block that has constant strides in both orders. A rectangle that cuts no digit is one piece; every
digit that it cuts, and every ragged end, adds at most two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .digits import BoundLine, Place

#: (start, stop) for each dim.
Box: TypeAlias = tuple[tuple[int, int], ...]


class Axis(NamedTuple):
    """``size`` steps: ``step`` coordinates of checkpoint dim ``dim`` each, ``image`` elements of memory each."""

    size: int
    dim: int
    step: int
    image: int


class Piece(NamedTuple):
    """Elements ``start + sum(i * axis.step)`` of a rectangle, at ``offset + sum(i * axis.image)`` of the memory."""

    start: tuple[int, ...]
    offset: int
    axes: tuple[Axis, ...]


Chain = Sequence[tuple[int, "Chain | Place"]]


def pieces(lines: Sequence[BoundLine], shape: Sequence[int], box: Sequence[tuple[int, int]]) -> list[Piece]:
    """``box`` (start and stop per dim of ``shape``) in the order that ``lines``, one after the other, give."""
    if any(stop <= start for start, stop in box):
        return []
    strides = row_major(shape)
    offset = sum(start * stride for (start, _), stride in zip(box, strides, strict=True))
    axes = tuple(Axis(stop - start, dim, 1, strides[dim]) for dim, (start, stop) in enumerate(box) if stop - start > 1)
    found = [Piece((0,) * len(shape), offset, axes)]
    for line in lines:
        dims = [[(place.source, place) for place in places] for places in line.places]
        chain = list(zip(row_major(line.shape), dims, strict=True))
        found = [routed for piece in found for routed in _route(*piece, chain)]
    return found


def whole(shape: Sequence[int]) -> Box:
    return tuple((0, size) for size in shape)


def sizes(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def shown(box: Box) -> str:
    """As one writes an index: ``[0:2, 4:8]``."""
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"


def row_major(shape: Sequence[int]) -> list[int]:
    """Element strides of a contiguous tensor."""
    strides = [1] * len(shape)
    for dim in reversed(range(len(shape) - 1)):
        strides[dim] = strides[dim + 1] * max(shape[dim + 1], 1)
    return strides


def positions_in(shape: Sequence[int], box: Box) -> Tensor:
    """int64, the box's shape: the row-major position in ``shape`` of each of its elements."""
    found = torch.zeros((), dtype=torch.int64)
    for (start, stop), stride in zip(box, row_major(shape), strict=True):
        found = found[..., None] + torch.arange(start, stop) * stride
    return found


def _route(start: tuple[int, ...], offset: int, axes: Sequence[Axis], chain: Chain | Place) -> Iterator[Piece]:
    """The pieces of one piece after its image was written in the digits of ``chain`` and put at their kernel place values."""
    if isinstance(chain, Place):
        sign = -1 if chain.flipped else 1
        base = (chain.capacity - 1 - offset if chain.flipped else offset) * chain.kernel
        yield Piece(start, base, tuple(a._replace(image=sign * a.image * chain.kernel) for a in axes))
    elif not chain:
        yield Piece(start, 0, ())
    else:
        (value, digit), *rest = chain
        for at, base, high, low in _divide(start, offset, tuple(axes), value):
            quotients = [a._replace(image=a.image // value) for a in high]
            for inner in _route(at, base // value, quotients, digit):
                for outer in _route(inner.start, base % value, low, rest):
                    yield Piece(outer.start, inner.offset + outer.offset, inner.axes + outer.axes)


_Divided = tuple[tuple[int, ...], int, tuple[Axis, ...], tuple[Axis, ...]]


def _divide(start: tuple[int, ...], offset: int, axes: tuple[Axis, ...], value: int) -> Iterator[_Divided]:
    """Split until the image is ``value`` times (high axes) plus a remainder (low axes) that never reaches ``value``."""
    high = tuple(a for a in axes if a.image % value == 0)
    low = tuple(a for a in axes if a.image % value)
    if not low:
        yield start, offset, high, low
        return
    largest = max(low, key=lambda a: abs(a.image))
    others = tuple(a for a in axes if a is not largest)
    reach = sum((a.size - 1) * a.image for a in low)
    if all(a.image > 0 for a in low) and offset % value + reach < value:
        yield start, offset, high, low
        return
    inner = sum((a.size - 1) * a.image for a in low if a is not largest)
    unit = largest.image
    aligned = 0 < unit < value and value % unit == 0 and all(a.image > 0 for a in low) and offset % unit + inner < unit
    cuts = _runs(largest.size, offset // unit % (value // unit), value // unit) if aligned else _each(largest.size)
    for first, blocks, size in cuts:
        at = tuple(s + first * largest.step * (dim == largest.dim) for dim, s in enumerate(start))
        parts = [largest._replace(size=size)] if size > 1 else []
        if blocks > 1:
            parts.append(Axis(blocks, largest.dim, largest.step * size, unit * size))
        yield from _divide(at, offset + first * unit, (*others, *parts), value)


def _runs(size: int, phase: int, period: int) -> Iterator[tuple[int, int, int]]:
    """0..size cut where ``phase + i`` is a multiple of ``period``: (first, whole blocks, size of a block)."""
    head = min((-phase) % period, size)
    if head:
        yield 0, 1, head
    blocks, tail = divmod(size - head, period)
    if blocks:
        yield head, blocks, period
    if tail:
        yield head + blocks * period, 1, tail


def _each(size: int) -> Iterator[tuple[int, int, int]]:
    for first in range(size):
        yield first, 1, 1
