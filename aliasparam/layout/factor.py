"""The digits of a traced permutation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """``size`` values, each ``place`` positions further (backwards where negative)."""

    size: int
    place: int


class Factored(NamedTuple):
    """Digits of one dim, most significant first; ``halves``: the first is equal parts, each ragged for itself."""

    digits: tuple[Step, ...]
    halves: bool


def factor(positions: Tensor) -> list[list[Factored]] | None:
    """For every dim, the ways to write it in digits; None where there is none. Positions must be a sum over dims."""
    dims = range(positions.dim())
    found = [list(_ways(positions[tuple(slice(None) if d == dim else 0 for d in dims)])) for dim in dims]
    return found if all(found) else None


def _ways(line: Tensor) -> Iterator[Factored]:
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


def _chain(line: Tensor) -> list[Step] | None:
    """Digits of a function of one coordinate, found from the least significant on."""
    found: list[Step] = []
    while len(line) > 1:
        place = int(line[1] - line[0])
        breaks = ((line[1:] - line[:-1]) != place).nonzero().view(-1) + 1
        size = math.gcd(*breaks.tolist()) if len(breaks) else len(line)
        if size < 2:
            return None
        found.insert(0, Step(size, place))
        line = line[::size]
    return found


def lines(dims: tuple[Factored, ...], room: int, kernel_shape: tuple[int, ...]) -> Iterator[str]:
    """Lines that have these digits, ``room`` positions in all; those that generalize best first."""
    keys = [(d, i) for d, dim in enumerate(dims) for i in range(len(dim.digits))]
    order = sorted(keys, key=lambda key: -abs(dims[key[0]].digits[key[1]].place))
    places = [abs(dims[d].digits[i].place) for d, i in order]
    capacities = [above // place if above % place == 0 else 0 for above, place in zip([room, *places], places, strict=False)]
    if not order or places[-1] != 1 or not all(capacities):
        return
    capacity = dict(zip(order, capacities, strict=True))
    options = [list(_left(d, dim, capacity)) for d, dim in enumerate(dims)]
    for choice in itertools.product(*options):
        names = {key: name for _, _, named in choice for key, name in named.items()}
        sizes = {name: size for _, sized, _ in choice for name, size in sized.items()}
        ones = [["abcdefgh"[d]] for d, dim in enumerate(dims) if not dim.digits]
        right = [*ones, *([f"{'~' * (dims[d].digits[i].place < 0)}{name}" for name in names[d, i]] for d, i in order)]
        room_of = [1] * len(ones) + [capacity[key] for key in order]
        text = " ".join(text for text, _, _ in choice)
        spelled = " ".join(f"{name}={size}" for name, size in sizes.items())
        for side in _sides(right, room_of, kernel_shape):
            yield f"{text} -> {side}" + (f", {spelled}" if spelled else "")


_Left = tuple[str, dict[str, int], dict[tuple[int, int], list[str]]]


def _left(d: int, dim: Factored, capacity: dict[tuple[int, int], int]) -> Iterator[_Left]:
    """(left side, fixed sizes, names of each digit) of one dim, for every choice of the digit that is free."""
    head = 1 if dim.halves else 0
    names = {(d, i): [f"{'abcdefgh'[d]}{i}"] for i in range(len(dim.digits))}
    room = {names[key][0]: capacity[key] for key in names}
    if not names:
        yield f"{'abcdefgh'[d]}", {}, {}
        return
    for i in range(head, len(dim.digits)):
        key = (d, i)
        leading = i == head
        rounded = capacity[key] != dim.digits[i].size
        if not leading and rounded:
            continue
        for tile in _tiles(dim.digits[i].size, capacity[key]) if leading else [1]:
            mine = {**names, key: names[key] if tile == 1 else [names[key][0], f"{names[key][0]}t"]}
            flat = [name for k in range(head, len(dim.digits)) for name in mine[d, k]]
            inner = " ".join(flat)
            text = f"({names[d, 0][0]} ({inner}))" if head else f"({inner})"
            sizes = {name: size for name, size in room.items() if name != names[key][0]}
            yield text, {**sizes, **({f"{names[key][0]}t": tile} if tile > 1 else {})}, mine


def _tiles(size: int, capacity: int) -> list[int]:
    """Multiples that ``size`` may be padded to so that it is ``capacity``: the smallest first, 1 where nothing is padded."""
    if size == capacity:
        return [1, size]
    return [tile for tile in range(2, capacity + 1) if capacity % tile == 0 and -(-size // tile) * tile == capacity]


def _sides(right: list[list[str]], room: list[int], kernel_shape: tuple[int, ...]) -> Iterator[str]:
    """The right side: grouped as ``kernel_shape`` where the digits allow it, and flat."""
    yield " ".join(name for names in right for name in names)
    groups, rest = [], list(zip(right, room, strict=True))
    for extent in kernel_shape:
        inner: list[str] = []
        while extent > 1 and rest and extent % rest[0][1] == 0:
            extent //= rest[0][1]
            inner += rest.pop(0)[0]
        groups.append(f"({' '.join(inner)})")
        if extent != 1:
            return
    if not rest:
        yield " ".join(groups)
