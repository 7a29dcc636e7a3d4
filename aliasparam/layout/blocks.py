"""Blocks that two orders keep together: what a storage moves at a time when it goes from one order to the other in place.

A digit that has the same place value in both kernel orders cuts both into the same cells. Fixing such digits, one value (or a run
of values) at a time, gives blocks of checkpoint elements whose memory the other blocks never touch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .boxes import Box, row_major, sizes
from .digits import BoundLine

Ranges = list[list[tuple[int, int]]]  # per dim


class Cut(NamedTuple):
    """A digit of dim ``dim`` that both orders keep in place: value v is coordinates ``v * step .. (v + 1) * step`` (mod all)."""

    dim: int
    step: int
    size: int


def common(first: BoundLine, second: BoundLine, shape: Sequence[int], lead: int) -> Iterator[Cut]:
    """The digits with the same place value in both orders of the dims from ``lead`` on."""
    elements, values = math.prod(shape[lead:]), {digit.value for digit in (*first.digits, *second.digits)}
    for dim, (extent, stride) in list(enumerate(zip(shape, row_major(shape), strict=True)))[lead:]:
        end = stride * extent
        for value in sorted({v for v in values if stride < v < end and v % stride == 0} | {stride}, reverse=True):
            kept = _part(first, elements, value, end)
            size = -(-end // value)
            if size > 1 and (end == stride * extent or end % value == 0) and kept and kept == _part(second, elements, value, end):
                yield Cut(dim, value // stride, size)
            end = value


def _part(line: BoundLine, above: int, value: int, end: int) -> tuple[int, int] | None:
    """Of ``x % end // value``, for x below ``above``: the kernel place value and the next. None where no digit has them."""
    for size, kernel, low in line.digits:
        if low <= value:
            times = size if above == end else end // low
            return None if value % low or kernel < 0 or size % times else (kernel * (value // low), kernel * times)
        above = low
    return None


def blocks(shape: Sequence[int], cuts: Sequence[Cut], limit: int) -> Iterator[list[Box]]:
    """All elements of ``shape`` in blocks of at most ``limit`` elements, where the cuts allow it."""
    yield from _cut(shape, [[(0, extent)] for extent in shape], list(cuts), limit)


def _cut(shape: Sequence[int], ranges: Ranges, cuts: list[Cut], limit: int) -> Iterator[list[Box]]:
    held = math.prod(sum(stop - start for start, stop in dim) for dim in ranges)
    if not held:
        return
    if held <= limit or not cuts:
        yield [tuple(box) for box in itertools.product(*ranges)]
        return
    cut, *rest = cuts
    many = max(1, cut.size * limit // held)
    for value in range(0, cut.size, many):
        part = list(ranges)
        part[cut.dim] = list(_within(ranges[cut.dim], cut, value, min(value + many, cut.size), shape[cut.dim]))
        yield from _cut(shape, part, rest, limit)


def _within(ranges: list[tuple[int, int]], cut: Cut, first: int, last: int, extent: int) -> Iterator[tuple[int, int]]:
    period = cut.step * cut.size
    for base in range(0, extent, period):
        for start, stop in ranges:
            low, high = max(start, base + first * cut.step), min(stop, base + last * cut.step)
            if low < high:
                yield low, high


def lead_cuts(shape: Sequence[int], lead: int) -> list[Cut]:
    return [Cut(dim, 1, extent) for dim, extent in enumerate(shape[:lead]) if extent > 1]


def tiles(box: Box, elements: int) -> Iterator[Box]:
    """``box`` cut along its first dims into boxes of at most ``elements`` elements."""
    shape = sizes(box)
    if 0 < math.prod(shape) <= elements:  # most tensors are small
        yield box
        return
    for (part,) in blocks(shape, lead_cuts(shape, len(shape)), elements):
        yield tuple((low + start, low + stop) for (start, stop), (low, _) in zip(part, box, strict=True))
