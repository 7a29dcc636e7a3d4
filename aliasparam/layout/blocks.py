"""Blocks that two orders keep together: what a storage moves at a time when it goes from one order to the other in place.

A digit that has the same place value in both kernel orders cuts both into the same cells. Fixing such digits, one value (or a run
of values) at a time, gives blocks of checkpoint elements whose memory the other blocks never touch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from .boxes import Box, row_major, sizes
from .digits import BoundLine, refined

Ranges = list[list[tuple[int, int]]]  # per dim


class Cut(NamedTuple):
    """A digit of dim ``dim`` that both orders keep in place: value v is coordinates ``v * step .. (v + 1) * step`` (mod all)."""

    dim: int
    step: int
    size: int


def common(first: BoundLine, second: BoundLine, shape: Sequence[int], lead: int) -> Iterator[Cut]:
    """The digits with the same place value and size in both orders of the dims from ``lead`` on."""
    if not (_is_whole(first) and _is_whole(second)):
        return
    elements, strides = math.prod(shape[lead:]), row_major(shape)
    places = {*strides[lead:], *(digit.value for digit in (*first.digits, *second.digits))}
    one, other = (refined(line.digits, places, exact=True) for line in (first, second))
    for dim, (extent, stride) in list(enumerate(zip(shape, strides, strict=True)))[lead:]:
        last = end = stride * extent
        if last != elements and not (last in one and last in other):
            continue  # a digit goes on from this dim to the next
        for value in sorted((v for v in places if stride <= v < last), reverse=True):
            if value % stride or (end % value and end != last):
                break  # below a ragged end that is not the dim's own (of halves), digits are not of the coordinate
            if value in one and one[value] == other.get(value) and one[value].kernel > 0:
                yield Cut(dim, value // stride, -(-end // value))
            end = value


def _is_whole(line: BoundLine) -> bool:
    """Whether each digit counts whole multiples of those below it in memory (of two lines made one it need not)."""
    steps = sorted((abs(kernel), size) for size, kernel, _ in line.digits)
    return all(above % (kernel * size) == 0 for (kernel, size), (above, _) in pairwise(steps))


def blocks(shape: Sequence[int], cuts: Sequence[Cut], limit: int, ranges: Ranges | None = None) -> Iterator[list[Box]]:
    """All elements of ``shape`` (of these ``ranges`` of it) in blocks of at most ``limit`` elements, where the cuts allow it."""
    ranges = [[(0, extent)] for extent in shape] if ranges is None else ranges
    held = math.prod(sum(stop - start for start, stop in dim) for dim in ranges)
    if held <= limit or not cuts:
        yield from [[tuple(box) for box in itertools.product(*ranges)]] if held else []
        return
    cut, *rest = cuts
    many = max(1, cut.size * limit // held)
    for value in range(0, cut.size, many):
        part = list(ranges)
        part[cut.dim] = list(_within(ranges[cut.dim], cut, value, min(value + many, cut.size), shape[cut.dim]))
        yield from blocks(shape, rest, limit, part)


def _within(ranges: list[tuple[int, int]], cut: Cut, first: int, last: int, extent: int) -> Iterator[tuple[int, int]]:
    period = cut.step * cut.size
    for base in range(0, extent, period):
        for start, stop in ranges:
            low, high = max(start, base + first * cut.step), min(stop, base + last * cut.step)
            if low < high:
                yield low, high


def each(shape: Sequence[int]) -> list[Cut]:
    """The coordinates of the first dims."""
    return [Cut(dim, 1, extent) for dim, extent in enumerate(shape) if extent > 1]


def tiles(box: Box, elements: int) -> Iterator[Box]:
    """``box`` cut along its first dims into boxes of at most ``elements`` elements."""
    shape = sizes(box)
    if 0 < math.prod(shape) <= elements:  # most tensors are small
        yield box
        return
    for (part,) in blocks(shape, each(shape), elements):
        yield tuple((low + start, low + stop) for (start, stop), (low, _) in zip(part, box, strict=True))
