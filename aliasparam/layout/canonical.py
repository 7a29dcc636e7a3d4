"""The canonical form of lines: what equality and hashes go by."""

from __future__ import annotations

import itertools
from typing import Any

from .pattern import Digit, Group, Line


def canonical(lines: tuple[Line, ...]) -> tuple[Any, ...]:
    """Lines with names by position, ones dropped, and digits joined that follow one another on both sides."""
    return tuple(_line(line) for line in lines)


def _line(line: Line) -> tuple[Any, ...]:
    sizes = dict(line.sizes)
    flipped = {d.name for d in line.left.digits() if d.flipped} ^ {d.name for d in line.right.digits() if d.flipped}
    left = [_tree(group, sizes) for group in line.left.dims]
    right = [_tree(group, sizes) for group in line.right.dims]
    for first, second in _neighbours(left):
        alike = first in sizes and second in sizes and (first in flipped) == (second in flipped)
        if alike and (first, second) in _neighbours(right):
            sizes[second] *= sizes.pop(first)
            left, right = [_without(t, first) for t in left], [_without(t, first) for t in right]
    order: dict[str, int] = {}
    for tree in left:
        _number(tree, order)
    named = tuple(_renamed(tree, order) for tree in left), tuple(_renamed(tree, order) for tree in right)
    return named, line.left.flat, line.right.flat, tuple((sizes.get(name), name in flipped) for name in order)


Tree = list[Any]


def _tree(group: Group, sizes: dict[str, int]) -> Tree:
    return [
        item.name if isinstance(item, Digit) else _tree(item, sizes)
        for item in group.items
        if not isinstance(item, Digit) or sizes.get(item.name) != 1
    ]


def _neighbours(trees: list[Tree]) -> list[tuple[str, str]]:
    """Digits that follow one another within a group."""
    found = []
    for tree in trees:
        found += [(a, b) for a, b in itertools.pairwise(tree) if isinstance(a, str) and isinstance(b, str)]
        found += _neighbours([item for item in tree if isinstance(item, list)])
    return found


def _without(tree: Tree, name: str) -> Tree:
    return [_without(item, name) if isinstance(item, list) else item for item in tree if item != name]


def _number(tree: Tree, order: dict[str, int]) -> None:
    for item in tree:
        _number(item, order) if isinstance(item, list) else order.setdefault(item, len(order))


def _renamed(tree: Tree, order: dict[str, int]) -> tuple[Any, ...]:
    return tuple(_renamed(item, order) if isinstance(item, list) else order[item] for item in tree)
