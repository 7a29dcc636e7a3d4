"""Blocks that two orders keep together: what a storage moves at a time when it goes from one order to the other in place.

A digit that has the same place value in both kernel orders cuts both into the same cells. Fixing such digits, one value (or a run
of values) at a time, gives blocks of checkpoint elements whose memory the other blocks never touch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .boxes import Box, sizes
from .digits import BoundLine, Place

Ranges = list[list[tuple[int, int]]]  # per dim


class Cut(NamedTuple):
    """A digit of dim ``dim`` that both orders keep in place: value v is coordinates ``v * step .. (v + 1) * step`` (mod all)."""

    dim: int
    step: int
    size: int


def common(first: BoundLine, second: BoundLine, lead: int) -> Iterator[Cut]:
    """The digits with the same place value in both orders."""
    for dim, (extent, one, other) in enumerate(zip(first.shape, first.places, second.places, strict=True)):
        steps = sorted({place.source for place in (*one, *other)} | {1}, reverse=True)
        for above, step in zip([None, *steps], steps, strict=False):
            size = -(-extent // step) if above is None else above // step
            kept = _part(one, step, above)
            if size > 1 and not (above and above % step) and kept and kept == _part(other, step, above):
                yield Cut(lead + dim, step, size)


def _part(places: Sequence[Place], step: int, above: int | None) -> tuple[int, int] | None:
    """Of coordinates ``x % above // step``: the kernel place value and the one above it. None where no digit has them."""
    end = None
    for place in places:
        if place.source <= step and (end is None or step < end):
            times = place.capacity if above == end else (above or 0) // place.source
            if step % place.source or place.flipped or place.capacity % times:
                return None
            return place.kernel * (step // place.source), place.kernel * times
        end = place.source
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
    if not all(stop > start for start, stop in box):
        return
    if math.prod(sizes(box)) <= elements:
        yield box
        return
    (start, stop), rest = box[0], math.prod(sizes(box[1:]))
    many = max(elements // rest, 1)
    for first in range(start, stop, many):
        part = (first, min(first + many, stop))
        inner = [box[1:]] if rest <= elements else tiles(box[1:], elements)
        yield from ((part, *others) for others in inner)
