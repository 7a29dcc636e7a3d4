"""From one order to another in place: a permutation of memory, in blocks that both orders keep together.

A digit that has the same place value in both orders cuts the memory into the same cells. Fixing such digits, one value (or a run
of values) at a time, gives blocks of memory that the other blocks never touch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from .digits import Axis, BoundLine, Piece, exchanged, forwards, joined, routed, row_major


def permutation(old: BoundLine, new: BoundLine) -> Piece | None:
    """Where every element of memory, padding too, goes: from its place in the one order (value) to that in the other (kernel).

    None where the two orders pad otherwise, or their digits have no common parts.
    """
    (before, padding), (after, other) = _padded(old), _padded(new)
    if padding != other:
        return None
    found = routed(Piece(0, old.start, [Axis(size, place, kernel) for size, kernel, place in before]), new._replace(digits=after))
    runs = {_run(side) for piece in found for side in (piece, exchanged(piece))}
    return found[0] if len(found) == len(runs) == 1 and None not in runs else None


def _padded(line: BoundLine) -> tuple[list[Axis], list[Axis]]:
    """The digits by their places in the padded tensor; and these by their places in the tensor: how it is padded."""
    places = row_major([digit.size for digit in line.digits])
    digits = [digit._replace(value=place) for digit, place in zip(line.digits, places, strict=True)]
    return digits, joined(digit._replace(kernel=place) for digit, place in zip(line.digits, places, strict=True))


def _run(piece: Piece) -> tuple[int, int] | None:
    """Where the one run of kernel memory begins and how long it is that the piece fills, or None."""
    start, _, axes = forwards(piece)
    filled = joined(Axis(a.size, a.kernel, a.kernel) for a in sorted(axes, key=lambda a: -a.kernel))
    return (start, filled[0].size) if len(filled) == 1 and filled[0].kernel == 1 else None


def blocks(moves: Piece, limit: int) -> Iterator[Piece]:
    """All of ``moves`` in blocks of at most ``limit`` elements, where digits that stay in place allow it."""
    held = math.prod(axis.size for axis in moves.axes)
    kept = max((axis for axis in moves.axes if axis.kernel == axis.value), key=lambda a: abs(a.value), default=None)
    if held <= limit or kept is None:
        yield moves
        return
    size, step, _ = kept
    many = max(1, size * limit // held)
    for first in range(0, size, many):
        part = min(many, size - first)
        axes = [Axis(part, step, step) if axis is kept else axis for axis in moves.axes if part > 1 or axis is not kept]
        yield from blocks(Piece(moves.kernel + first * step, moves.value + first * step, axes), limit)
