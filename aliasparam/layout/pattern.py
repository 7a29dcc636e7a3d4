"""The notation: one line such as ``(g b a) k -> g a b k, a=4 b=8`` as two sides of digits, with the sizes that are fixed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..errors import LayoutError

_TOKEN = re.compile(r"\s*([A-Za-z_][A-Za-z_0-9]*|\d+|->|[()\[\]~,=])")
#: Groups in one another: each is padded for itself, and three levels are the most that any kernel has.
_DEEPEST = 50


@dataclass(frozen=True, slots=True)
class Digit:
    """One digit of an index; ``flipped``: counted backwards."""

    name: str
    flipped: bool = False

    def __str__(self) -> str:
        return f"~{self.name}" if self.flipped else self.name


@dataclass(frozen=True, slots=True)
class Group:
    """Digits of one index, most significant first. A group within a group has an extent, and a ragged end, of its own."""

    items: tuple[Digit | Group, ...]

    def __str__(self) -> str:
        return f"({' '.join(map(str, self.items))})"

    def digits(self) -> Iterator[Digit]:
        for item in self.items:
            yield from item.digits() if isinstance(item, Group) else (item,)


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a line: a dim an item, outermost first.

    ``flat``: written in brackets, or without any parentheses on the right. Then the digits are the order of the memory alone,
    and the dims are those of the other side, padded.
    """

    dims: tuple[Group, ...]
    flat: bool = False

    def digits(self) -> Iterator[Digit]:
        for dim in self.dims:
            yield from dim.digits()

    def text(self, *, grouped: bool) -> str:
        """``grouped``: with parentheses somewhere, so that a right side is not read as flat."""
        if self.flat:
            names = " ".join(map(str, self.digits()))
            return f"[{names}]" if grouped else names
        bare = [str(dim.items[0]) if len(dim.items) == 1 and isinstance(dim.items[0], Digit) else str(dim) for dim in self.dims]
        if grouped and bare and not any("(" in dim for dim in bare):
            bare[0] = f"({bare[0]})"
        return " ".join(bare)


@dataclass(frozen=True, slots=True)
class Line:
    """A parsed line. ``sizes`` holds the digits whose size is fixed, in the order of the left side."""

    left: Side
    right: Side
    sizes: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.sizes)
        line = f"{self.left.text(grouped=self.left.flat)} -> {self.right.text(grouped=not self.right.flat)}"
        return f"{line}, {sizes}" if sizes else line

    def exchanged(self) -> Line:
        return Line(self.right, self.left, self.sizes)

    @property
    def flipped(self) -> set[str]:
        """The digits that the two sides count in opposite directions."""
        left, right = ({digit.name for digit in side.digits() if digit.flipped} for side in (self.left, self.right))
        return left ^ right

    @property
    def shape_side(self) -> Side:
        """The side whose groups give sizes to the digits."""
        return self.right if self.left.flat else self.left


def parse(text: str, sizes: Mapping[str, int]) -> tuple[Line, dict[str, int]]:
    """The line and the sizes in ``text`` and ``sizes`` that belong to none of its digits (``bits``). Raises LayoutError."""
    tokens = list(_tokens(text))
    if tokens.count("->") != 1:
        raise LayoutError("a layout has one arrow between its two sides", expected="(g b a) k -> g a b k, a=4 b=8", found=text)
    arrow = tokens.index("->")
    comma = tokens.index(",", arrow) if "," in tokens[arrow:] else len(tokens)
    given = {**_sizes(tokens[comma + 1 :], text), **sizes}
    left, right = _side(tokens[:arrow], text), _side(tokens[arrow + 1 : comma], text)
    if not right.flat and all(len(d.items) == 1 for d in right.dims) and not {"(", "["} & set(tokens[arrow:comma]):
        right = Side((Group(tuple(right.digits())),), flat=True)
    names = [digit.name for digit in left.digits()]
    own = tuple((name, given[name]) for name in names if name in given)
    line = Line(left, right, own)
    _check(line, text)
    return line, {name: size for name, size in given.items() if name not in names}


def _tokens(text: str) -> Iterator[str]:
    at = 0
    while at < len(text.rstrip()):
        match = _TOKEN.match(text, at)
        if match is None:
            raise LayoutError("a layout has an unexpected character", expected="names, ( ) [ ] ~ -> , =", found=text[at:])
        yield match[1]
        at = match.end()


def _sizes(tokens: list[str], text: str) -> dict[str, int]:
    tokens = [token for token in tokens if token != ","]
    if len(tokens) % 3 or any(equals != "=" for equals in tokens[1::3]) or not all(n.isdigit() for n in tokens[2::3]):
        raise LayoutError("the sizes of a layout do not parse", expected="a=4 b=8", found=text)
    names = tokens[::3]
    if len(set(names)) < len(names):
        raise LayoutError("a digit has two sizes", found=text)
    return {name: int(size) for name, size in zip(names, tokens[2::3], strict=True)}


def _side(tokens: list[str], text: str) -> Side:
    if tokens and tokens[0] == "[":
        if tokens[-1] != "]" or {"(", ")", "["} & set(tokens[1:]):
            raise LayoutError("brackets hold all digits of a side and no parentheses", expected="[g a b k]", found=text)
        group, _ = _group(tokens[1:-1], 0, text)
        return Side((group,), flat=True)
    whole, end = _group(tokens, 0, text)
    if end != len(tokens):
        raise LayoutError("a layout has a closing parenthesis too many", found=text)
    return Side(tuple(item if isinstance(item, Group) else Group((item,)) for item in whole.items))


def _group(tokens: list[str], at: int, text: str, depth: int = 0) -> tuple[Group, int]:
    if depth > _DEEPEST:
        raise LayoutError("groups of a layout are nested too deep", expected=f"at most {_DEEPEST} deep", found=text[:80])
    items: list[Digit | Group] = []
    while at < len(tokens) and tokens[at] != ")":
        if tokens[at] == "(":
            inner, at = _group(tokens, at + 1, text, depth + 1)
            if at == len(tokens):
                raise LayoutError("a layout has an open parenthesis that is not closed", found=text)
            items.append(inner)
        else:
            flipped = tokens[at] == "~"
            at += flipped
            if at == len(tokens) or not tokens[at].isidentifier():
                raise LayoutError("a layout names its digits", expected="a name", found=text)
            items.append(Digit(tokens[at], flipped))
        at += 1
    return Group(tuple(items)), at


def _check(line: Line, text: str) -> None:
    left, right = ([digit.name for digit in side.digits()] for side in (line.left, line.right))
    for names, side in ((left, "left"), (right, "right")):
        for name in names:
            if names.count(name) > 1:
                raise LayoutError(f"digit {name} stands twice on the {side}", expected="every digit once a side", found=text)
    if set(left) != set(right):
        raise LayoutError(
            "the two sides have different digits", expected=f"{sorted(left)} on the right too", found=f"{sorted(right)} in {text}"
        )
    if line.left.flat and line.right.flat:
        raise LayoutError("one side must say the dims", expected="(g b a) k -> [g a b k]", found=text)
    for name, size in line.sizes:
        if size < 1:
            raise LayoutError(f"the size of digit {name} is no positive integer", found=size)
    sizes = dict(line.sizes)
    for dim in line.shape_side.dims:
        _one_free(dim, sizes, text)


def _one_free(group: Group, sizes: Mapping[str, int], text: str) -> None:
    free = [str(item) for item in group.items if fixed_size(item, sizes) is None]
    if len(free) > 1:
        raise LayoutError(
            f"digits {' and '.join(free)} of one group have no size", expected=f"a size for all but one of {group}", found=text
        )
    for item in group.items:
        if isinstance(item, Group):
            _one_free(item, sizes, text)


def fixed_size(item: Digit | Group, sizes: Mapping[str, int]) -> int | None:
    """The product of its sizes, or None where one of them is free."""
    if isinstance(item, Digit):
        return sizes.get(item.name)
    inner = [fixed_size(part, sizes) for part in item.items]
    return None if None in inner else math.prod(size for size in inner if size is not None)
