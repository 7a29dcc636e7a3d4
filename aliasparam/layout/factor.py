"""The digits of a traced permutation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Factored(NamedTuple):
    """Digits of one dim, most significant first: their size, and what one step is in kernel memory (negative: backwards).

    ``halves``: the first is equal parts, each ragged for itself.
    """

    digits: tuple[tuple[int, int], ...]
    halves: bool


def ways(line: Tensor) -> Iterator[Factored]:
    """The ways to write positions along one dim in digits."""
    chain = _chain(line)
    if chain is not None:
        yield Factored(tuple(chain), False)
    for parts in (2, 3, 4):
        if len(line) % parts == 0 and len(line) >= 2 * parts:
            rows = line.view(parts, -1)
            starts, inner = rows[:, 0], _chain(rows[0])
            alike = torch.equal(rows - starts[:, None], (rows[0] - starts[0]).expand_as(rows))
            outer = _chain(starts)
            if inner is not None and alike and outer is not None and len(outer) == 1:
                yield Factored((*outer, *inner), True)


def _chain(line: Tensor) -> list[tuple[int, int]] | None:
    """Digits of a function of one coordinate, found from the least significant on."""
    found: list[tuple[int, int]] = []
    while len(line) > 1:
        place = int(line[1] - line[0])
        breaks = ((line[1:] - line[:-1]) != place).nonzero().view(-1) + 1
        size = math.gcd(*breaks.tolist()) if len(breaks) else len(line)
        if size < 2:
            return None
        found.insert(0, (size, place))
        line = line[::size]
    return found


class _Digit(NamedTuple):
    """``place``: what one step is in kernel memory, negative where it is counted backwards; ``room`` for so many steps."""

    name: str
    place: int
    room: int
    free: bool = False


def texts(dims: Sequence[Factored], kernel_shape: tuple[int, ...]) -> Iterator[str]:
    """Lines that have these digits; those that generalize best first."""
    room = math.prod(kernel_shape)
    places = sorted((abs(place) for dim in dims for _, place in dim.digits), reverse=True)
    if places[-1:] != [1] or any(above % place for above, place in pairwise([room, *places])):
        return
    above = dict(zip(places, [room, *places], strict=False))
    for choice in itertools.product(*(_options("abcdefgh"[d], dim, above) for d, dim in enumerate(dims))):
        digits = sorted(itertools.chain(*(own for _, own in choice)), key=lambda digit: -abs(digit.place))
        left = " ".join(text for text, _ in choice)
        sizes = ", " + " ".join(f"{digit.name}={digit.room}" for digit in digits if not digit.free)
        for right in _sides(digits, kernel_shape):
            yield f"{left} -> {right}{sizes}"


def _options(letter: str, dim: Factored, above: dict[int, int]) -> Iterator[tuple[str, list[_Digit]]]:
    """The left side of one dim and its digits, for every choice of the digit that is free, and of the tiles it is padded to."""
    digits = [_Digit(f"{letter}{i}", place, above[abs(place)] // abs(place)) for i, (_, place) in enumerate(dim.digits)]
    if not digits:
        yield letter, [_Digit(letter, max(above.values()), 1, free=True)]
    head = int(dim.halves)
    for i, (name, place, room, _) in list(enumerate(digits))[head:]:
        size = dim.digits[i][0]
        if i > head and size != room:
            continue  # only the first is ragged
        for tile in _tiles(size, room) if i == head else [1]:
            free = _Digit(name, place * tile, room // tile, free=True)
            tiled = [_Digit(f"{name}t", place, tile)] if tile > 1 else []
            own = [*digits[:i], free, *tiled, *digits[i + 1 :]]
            inner = " ".join(digit.name for digit in own[head:])
            yield f"({own[0].name} ({inner}))" if head else f"({inner})", own


def _tiles(size: int, capacity: int) -> list[int]:
    """Multiples that ``size`` may be padded to so that it is ``capacity``: the smallest first, 1 where nothing is padded."""
    if size == capacity:
        return [1, size]
    return [tile for tile in range(2, capacity + 1) if capacity % tile == 0 and -(-size // tile) * tile == capacity]


def _sides(digits: Sequence[_Digit], kernel_shape: tuple[int, ...]) -> Iterator[str]:
    """The right side: flat, and grouped as ``kernel_shape`` where the digits allow it."""
    names = [f"{'~' * (digit.place < 0)}{digit.name}" for digit in digits]
    yield " ".join(names)
    groups, at = [], 0
    for extent in kernel_shape:
        first = at
        while extent > 1 and at < len(digits) and extent % digits[at].room == 0:
            extent //= digits[at].room
            at += 1
        groups.append(f"({' '.join(names[first:at])})")
        if extent != 1:
            return
    if at == len(digits):
        yield " ".join(groups)
