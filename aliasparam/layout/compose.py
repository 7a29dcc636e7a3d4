"""Two bound lines as one, where the digits of the first can be refined until each lies within one digit of the second."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from .boxes import row_major
from .digits import BoundLine, Place


class _Apart(Exception):
    """A digit of the one line straddles two of the other (halves of 192 rows in tiles of 128)."""


def compose(lines: list[BoundLine]) -> list[BoundLine]:
    """The same order in as few lines as possible."""
    done: list[BoundLine] = []
    for line in map(_merged, lines):
        try:
            done.append(_merged(_joined(done.pop(), line)) if done else line)
        except _Apart as apart:
            done += [*apart.args, line]
    return done


def _merged(line: BoundLine) -> BoundLine:
    """With digits joined that follow one another in both orders: a row count is one digit, whatever it was padded by."""
    dims = []
    for places in line.places:
        found: list[Place] = []
        for low in places:
            high = found[-1] if found else low
            step = low.source * low.capacity, low.kernel * low.capacity, low.flipped
            if found and (high.source, high.kernel, high.flipped) == step:
                low = replace(low, capacity=found.pop().capacity * low.capacity)
            found.append(low)
        dims.append(tuple(found))
    return replace(line, places=tuple(dims))


def _joined(first: BoundLine, second: BoundLine) -> BoundLine:
    spans = list(_spans(second))
    filled = {digit: 1 for _, _, digit in spans}
    try:
        dims = [[list(_parts(place, spans)) for place in dim] for dim in first.places]
    except _Apart:
        raise _Apart(first) from None
    for place, parts in zip(itertools.chain(*first.places), itertools.chain(*dims), strict=True):
        for digit, part in parts:
            filled[digit] *= part.capacity
        if place.flipped and place.capacity != math.prod(part.capacity for _, part in parts):
            raise _Apart(first)
    if any(digit.flipped and size != digit.capacity for digit, size in filled.items()):
        raise _Apart(first)  # counted backwards from an end that no element reaches
    places = tuple(tuple(part for parts in dim for _, part in parts) for dim in dims)
    return BoundLine(first.shape, places, second.kernel_shape, second.capacity)


_Span = tuple[int, int, Place]


def _spans(line: BoundLine) -> Iterator[_Span]:
    """(from, to, digit) of the row-major positions that each digit counts, the most significant first."""
    for stride, extent, places in zip(row_major(line.shape), line.shape, line.places, strict=True):
        end = stride * extent
        for place in places:
            yield stride * place.source, end, place
            end = stride * place.source


def _parts(place: Place, spans: list[_Span]) -> Iterator[tuple[Place, Place]]:
    """``place``, whose kernel place value is a row-major position, in the digits of the second line: each with its digit."""
    stop = place.kernel * place.capacity
    for start, end, digit in spans:
        low, high = max(start, place.kernel), min(end, stop)
        if low >= high:
            continue
        if low % start or low % place.kernel:
            raise _Apart
        size = -(-high // low)
        if size > 1:
            source, kernel = place.source * (low // place.kernel), digit.kernel * (low // start)
            yield digit, Place(source, kernel, size, place.flipped ^ digit.flipped)
