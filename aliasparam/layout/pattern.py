"""The notation: lines such as ``(g b a) k -> g a b k, a=4 b=8`` as two sides of digits, with the sizes that are fixed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..errors import LayoutError

_TOKEN = re.compile(r"\s*(~?\s*[A-Za-z_][A-Za-z_0-9]*|\d+|->|[()\[\]~,=])")
#: Groups in one another: each is padded for itself, and three levels are the most that any kernel has.
_DEEPEST = 50


@dataclass(frozen=True, slots=True)
class Group:
    """Digits of one index by name, most significant first, ``~`` before the name: counted backwards. Or the dims of one side.

    A group within a group has an extent, and a ragged end, of its own.

    ``flat``: a side in brackets, or without any parentheses on the right. Then the digits are the order of the memory alone, and
    the dims are those of the other side, padded.
    """

    items: tuple[str | Group, ...]
    flat: bool = False

    def __str__(self) -> str:
        return f"({' '.join(map(str, self.items))})"

    def side(self, *, grouped: bool) -> str:
        """The text of one side. ``grouped``: so that a right side is not read as flat, or a left side is."""
        dims = [*map(str, self.items)]
        if self.flat:
            return f"[{' '.join(dims)}]" if grouped else " ".join(dims)
        if grouped and dims and not any("(" in dim for dim in dims):
            dims[0] = f"({dims[0]})"
        return " ".join(dims)

    @property
    def dims(self) -> list[Group]:
        """Of a side."""
        return [self] if self.flat else [item if isinstance(item, Group) else Group((item,)) for item in self.items]

    def tokens(self) -> Iterator[str]:
        for item in self.items:
            yield from item.tokens() if isinstance(item, Group) else (item,)

    def digits(self) -> list[str]:
        return [token.removeprefix("~") for token in self.tokens()]


@dataclass(frozen=True, slots=True)
class Line:
    """A line. ``sizes`` holds the digits whose size is fixed, in the order of the left side.

    Raises:
        LayoutError: the sides have other digits, or sizes are missing.
    """

    left: Group
    right: Group
    sizes: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        _need_alike(self)
        for name, size in self.sizes:
            if size < 1:
                raise LayoutError(f"the size of digit {name} is no positive integer", found=size)
        for dim in self.shape_side.dims:
            _need_sizes(dim, dict(self.sizes), self)

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.sizes)
        line = f"{self.left.side(grouped=self.left.flat)} -> {self.right.side(grouped=not self.right.flat)}"
        return f"{line}, {sizes}" if sizes else line

    def exchanged(self) -> Line:
        sizes = dict(self.sizes)
        return Line(self.right, self.left, tuple((name, sizes[name]) for name in self.right.digits() if name in sizes))

    @property
    def flipped(self) -> set[str]:
        """The digits that the two sides count in opposite directions."""
        return {token.removeprefix("~") for token in set(self.left.tokens()) ^ set(self.right.tokens())}

    @property
    def shape_side(self) -> Group:
        """The side whose groups give sizes to the digits."""
        return self.right if self.left.flat else self.left

    def canonical(self) -> tuple[Any, ...]:
        """What equality goes by: names by position, ones dropped, and digits joined that follow one another on both sides."""
        sizes, flipped = dict(self.sizes), self.flipped
        # Every dim is in parentheses: digits follow one another only within a group.
        texts = [" ".join(map(str, side.dims)).replace("~", "") for side in (self.left, self.right)]
        left, right = ([t for t in re.findall(r"\w+|[()]", text) if sizes.get(t) != 1] for text in texts)
        for first, second in list(pairwise(left)):
            alike = first in sizes and second in sizes and (first in flipped) == (second in flipped)
            if alike and (first, second) in pairwise(right):
                sizes[second] *= sizes.pop(first)
                left.remove(first)
                right.remove(first)
        order = {name: at for at, name in enumerate(token for token in left if token not in "()")}
        named = tuple(tuple(order.get(token, token) for token in tokens) for tokens in (left, right))
        return named, self.left.flat, self.right.flat, tuple((sizes.get(name), name in flipped) for name in order)


def fixed_size(item: str | Group, sizes: Mapping[str, int]) -> int | None:
    """The product of its sizes, or None where one of them is free."""
    digits = Group((item,)).digits()
    return math.prod(sizes[name] for name in digits) if sizes.keys() >= set(digits) else None


def _need_alike(line: Line) -> None:
    left, right = line.left.digits(), line.right.digits()
    for names, side in ((left, "left"), (right, "right")):
        for name in names:
            if names.count(name) > 1:
                raise LayoutError(f"digit {name} stands twice on the {side}", expected="every digit once a side", found=line)
    if set(left) != set(right):
        raise LayoutError(
            "the two sides have different digits", expected=f"{sorted(left)} on the right too", found=f"{sorted(right)} in {line}"
        )
    if line.left.flat and line.right.flat:
        raise LayoutError("one side must say the dims", expected="(g b a) k -> [g a b k]", found=line)


def _need_sizes(group: Group, sizes: Mapping[str, int], line: Line) -> None:
    free = [str(item) for item in group.items if fixed_size(item, sizes) is None]
    if len(free) > 1:
        raise LayoutError(
            f"digits {' and '.join(free)} of one group have no size", expected=f"a size for all but one of {group}", found=line
        )
    for item in group.items:
        if isinstance(item, Group):
            _need_sizes(item, sizes, line)


def parse(text: str, sizes: Mapping[str, int]) -> tuple[tuple[Line, ...], int | None]:
    """The lines of ``text``, with the ``sizes`` beside those in it; and ``bits``, the width of elements. Raises LayoutError."""
    lines, bits, unused = [], sizes.get("bits"), sizes.keys() - {"bits"}
    for part in text.split("|"):
        line, others = _line(part, sizes)
        bits = others.pop("bits", bits)
        lines.append(line)
        unused &= others.keys()
        if strange := others.keys() - sizes.keys() or (unused if len(lines) > text.count("|") else set()):
            raise LayoutError("sizes for digits that the line lacks", found=sorted(strange), expected=text)
    return tuple(lines), bits


def _line(text: str, sizes: Mapping[str, int]) -> tuple[Line, dict[str, int]]:
    """One line, and the sizes that belong to none of its digits."""
    tokens = list(_tokens(text))
    if tokens.count("->") != 1:
        raise LayoutError("a layout has one arrow between its two sides", expected="(g b a) k -> g a b k, a=4 b=8", found=text)
    arrow = tokens.index("->")
    comma = tokens.index(",", arrow) if "," in tokens[arrow:] else len(tokens)
    given = {**_sizes(tokens[comma + 1 :], text), **sizes}
    left, right = _side(tokens[:arrow], text), _side(tokens[arrow + 1 : comma], text)
    if "(" not in tokens[arrow:comma]:
        right = Group(tuple(right.tokens()), flat=True)
    names = left.digits()
    line = Line(left, right, tuple((name, given[name]) for name in names if name in given))
    return line, {name: size for name, size in given.items() if name not in names}


def _tokens(text: str) -> Iterator[str]:
    at = 0
    while at < len(text.rstrip()):
        match = _TOKEN.match(text, at)
        if match is None:
            raise LayoutError("a layout has an unexpected character", expected="names, ( ) [ ] ~ -> , =", found=text[at:])
        yield "".join(match[1].split())
        at = match.end()


def _sizes(tokens: list[str], text: str) -> dict[str, int]:
    tokens = [token for token in tokens if token != ","]
    if len(tokens) % 3 or any(equals != "=" for equals in tokens[1::3]) or not all(n.isdigit() for n in tokens[2::3]):
        raise LayoutError("the sizes of a layout do not parse", expected="a=4 b=8", found=text)
    names = tokens[::3]
    if len(set(names)) < len(names):
        raise LayoutError("a digit has two sizes", found=text)
    return {name: int(size) for name, size in zip(names, tokens[2::3], strict=True)}


def _side(tokens: Sequence[str], text: str) -> Group:
    if not tokens or tokens[0] != "[":
        return _group(tokens, text)
    if tokens[-1] != "]" or {"(", ")", "["} & set(tokens[1:]):
        raise LayoutError("brackets hold all digits of a side and no parentheses", expected="[g a b k]", found=text)
    return Group(_group(tokens[1:-1], text).items, flat=True)


def _group(tokens: Sequence[str], text: str) -> Group:
    """A digit in parentheses of its own is that digit."""
    open_groups: list[list[str | Group]] = [[]]
    for token in tokens:
        if token == "(":
            if len(open_groups) > _DEEPEST:
                raise LayoutError("groups of a layout are nested too deep", expected=f"at most {_DEEPEST} deep", found=text[:80])
            open_groups.append([])
        elif token == ")":
            inner = open_groups.pop()
            if not open_groups:
                raise LayoutError("a layout has a closing parenthesis too many", found=text)
            open_groups[-1].append(inner[0] if len(inner) == 1 else Group(tuple(inner)))
        elif not token.removeprefix("~").isidentifier():
            raise LayoutError("a layout names its digits", expected="a name", found=text)
        else:
            open_groups[-1].append(token)
    if len(open_groups) > 1:
        raise LayoutError("a layout has an open parenthesis that is not closed", found=text)
    return Group(tuple(open_groups[0]))
