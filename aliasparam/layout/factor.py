"""A permutation that is a sum over dims as lines: positions along each dim in digits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class _Digit(NamedTuple):
    """``place``: what one step is in kernel memory, negative where it is counted backwards; ``room`` for so many steps."""

    place: int
    room: int
    free: bool = False


class _Reading(NamedTuple):
    """Digits of one dim, most significant first: so far as positions reach.

    ``halves``: the first is equal parts, each ragged for itself. ``swapped``: after the two halves of the dim changed places.
    """

    digits: list[tuple[int, int]]
    halves: bool
    swapped: bool


def texts(axes: Sequence[Tensor], kernel_shape: tuple[int, ...]) -> Iterator[str]:
    """Lines that put what is along each dim at the positions ``axes``; those that generalize best first."""
    total = math.prod(kernel_shape)
    for dims in sorted(itertools.product(*map(_readings, axes)), key=lambda dims: sum(dim.swapped for dim in dims)):
        places = sorted((abs(place) for dim in dims for _, place in dim.digits), reverse=True)
        if places[-1:] != [1] or any(above % place for above, place in pairwise([total, *places])):
            continue
        rooms = {place: above // place for above, place in pairwise([total, *places])}
        for choice in itertools.product(*(_choices(dim, rooms, total) for dim in dims)):
            yield from (_exchange(dims) + text for text in _texts(choice, [dim.halves for dim in dims], kernel_shape))


def _readings(axis: Tensor) -> Iterator[_Reading]:
    """The ways to write positions along one dim in digits."""
    for swapped in (False, True)[: 2 - len(axis) % 2]:
        line = axis.roll(len(axis) // 2) if swapped else axis
        yield from (_Reading(chain, False, swapped) for chain in _chains(line))
        for parts in (2, 3, 4):
            if len(line) % parts == 0 and len(line) >= 2 * parts:
                starts, rows = line.view(parts, -1)[:, 0], line.view(parts, -1)
                alike = torch.equal(rows - starts[:, None], (rows[0] - starts[0]).expand_as(rows))
                for outer, inner in itertools.product(_chains(starts), _chains(rows[0])) if alike else ():
                    if len(outer) == 1:
                        yield _Reading([*outer, *inner], True, swapped)


def _chains(line: Tensor) -> list[list[tuple[int, int]]]:
    """The one way to write a function of one coordinate in digits, found from the least significant on, or none."""
    found: list[tuple[int, int]] = []
    while len(line) > 1:
        place = int(line[1] - line[0])
        breaks = ((line[1:] - line[:-1]) != place).nonzero().view(-1) + 1
        size = math.gcd(*breaks.tolist()) if len(breaks) else len(line)
        if size < 2:
            return []
        found.insert(0, (size, place))
        line = line[::size]
    return [found]


def _choices(dim: _Reading, rooms: dict[int, int], total: int) -> Iterator[list[_Digit]]:
    """Its digits, for every choice of the one that is free, and of the tiles that the first is padded to."""
    digits = [_Digit(place, rooms[abs(place)]) for _, place in dim.digits]
    if not digits:
        yield [_Digit(total, 1, free=True)]
    head = int(dim.halves)
    for i, (place, room, _) in list(enumerate(digits))[head:]:
        for tile in _tiles(dim.digits[i][0], room) if i == head else [1]:
            tiled = [_Digit(place, tile)] if tile > 1 else []
            yield [*digits[:i], _Digit(place * tile, room // tile, free=True), *tiled, *digits[i + 1 :]]


def _tiles(size: int, capacity: int) -> list[int]:
    """Multiples that ``size`` may be padded to so that it is ``capacity``: the smallest first, 1 where nothing is padded."""
    if size == capacity:
        return [1, size]
    return [tile for tile in range(2, capacity + 1) if capacity % tile == 0 and -(-size // tile) * tile == capacity]


def _exchange(dims: Sequence[_Reading]) -> str:
    """The line before, that exchanges the halves of dims."""
    if not any(dim.swapped for dim in dims):
        return ""
    left = " ".join(f"(h{at} d{at})" if dim.swapped else f"(d{at})" for at, dim in enumerate(dims))
    sizes = " ".join(f"h{at}=2" for at, dim in enumerate(dims) if dim.swapped)
    return f"{left} -> {left.replace('h', '~h')}, {sizes} | "


def _texts(dims: Sequence[list[_Digit]], halves: Sequence[bool], kernel_shape: tuple[int, ...]) -> Iterator[str]:
    """With the right side flat, and grouped as ``kernel_shape`` where the digits allow it."""
    names = [[f"d{at}_{i}" for i in range(len(digits))] for at, digits in enumerate(dims)]
    inner = [" ".join(own[half:]) for own, half in zip(names, halves, strict=True)]
    left = " ".join(f"({own[0]} ({rest}))" if half else f"({rest})" for own, half, rest in zip(names, halves, inner, strict=True))
    order = zip(itertools.chain(*names), itertools.chain(*dims), strict=True)
    named = sorted(order, key=lambda digit: -abs(digit[1].place))
    right = [f"{'~' * (digit.place < 0)}{name}" for name, digit in named]
    sizes = " ".join(f"{name}={digit.room}" for name, digit in named if not digit.free)
    yield f"{left} -> {' '.join(right)}, {sizes}"
    groups, rooms = [], [digit.room for _, digit in named]
    for extent in kernel_shape:
        many = next((n for n in range(len(rooms) + 1) if math.prod(rooms[:n]) == extent), None)
        if many is None:
            return
        groups.append(f"({' '.join(right[:many])})")
        right, rooms = right[many:], rooms[many:]
    if not right:
        yield f"{left} -> {' '.join(groups)}, {sizes}"
