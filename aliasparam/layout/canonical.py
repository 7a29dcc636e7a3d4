"""The canonical form of lines: what equality and hashes go by."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from .pattern import Line, Side


def canonical(lines: tuple[Line, ...]) -> tuple[Any, ...]:
    """Lines with names by position, ones dropped, and digits joined that follow one another on both sides."""
    return tuple(_line(line) for line in lines)


def _line(line: Line) -> tuple[Any, ...]:
    sizes = dict(line.sizes)
    flipped = line.flipped
    left, right = ([token for token in _tokens(side) if sizes.get(token) != 1] for side in (line.left, line.right))
    for first, second in list(pairwise(left)):
        alike = first in sizes and second in sizes and (first in flipped) == (second in flipped)
        if alike and (first, second) in pairwise(right):
            sizes[second] *= sizes.pop(first)
            left.remove(first)
            right.remove(first)
    order = {name: at for at, name in enumerate(token for token in left if token.isidentifier())}
    named = tuple(tuple(order.get(token, token) for token in tokens) for tokens in (left, right))
    return named, line.left.flat, line.right.flat, tuple((sizes.get(name), name in flipped) for name in order)


def _tokens(side: Side) -> list[str]:
    """Names and parentheses, every dim in its own: digits follow one another only within a group."""
    text = " ".join(map(str, side.dims))
    return text.replace("(", "( ").replace(")", " )").replace("~", "").split()
