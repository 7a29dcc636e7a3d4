"""Bound lines one after the other as few lines, where the digits of one lie within digits of the next."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .digits import Axis, BoundLine, joined


def compose(lines: Iterable[BoundLine]) -> list[BoundLine]:
    """The same order in as few lines as possible."""
    done: list[BoundLine] = []
    for line in lines:
        both = _both(done[-1], line) if done else None
        done[len(done) - (both is not None) :] = [both or line]
    return done


def _both(first: BoundLine, second: BoundLine) -> BoundLine | None:
    """One line, or None: a digit of the one straddles two of the other (halves of 192 rows in tiles of 128)."""
    start, digits, backwards = second.start, [], 0
    for size, kernel, value in first.digits:
        parts = _parts(size, abs(kernel), value, second, first.capacity)
        if parts is None or (kernel < 0 and math.prod(part.size for part in parts) != size):
            return None
        if kernel < 0:  # so is every part of it
            backwards -= (size - 1) * kernel
            start += sum((part.size - 1) * part.kernel for part in parts)
            parts = [part._replace(kernel=-part.kernel) for part in parts]
        digits += parts
    # What is counted backwards from an end that no element reaches does not begin where its parts do.
    return BoundLine(start, joined(digits), second.kernel_shape) if first.start == backwards else None


def _parts(size: int, kernel: int, value: int, line: BoundLine, end: int) -> list[Axis] | None:
    """A digit whose steps are ``kernel`` positions of ``line``, which has ``end`` of them, in digits of ``line``."""
    found = []
    for digit in line.digits:
        low, high = max(digit.value, kernel), min(end, kernel * size)
        end = digit.value
        if low < high:
            if low % digit.value or low % kernel:
                return None
            found.append(Axis(-(-high // low), digit.kernel * (low // digit.value), value * (low // kernel)))
    return [part for part in found if part.size > 1]
