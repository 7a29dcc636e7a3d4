"""The notation: one line such as ``(g b a) k -> g a b k, a=4 b=8`` as two sides of digits, with the sizes that are fixed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..errors import LayoutError

_TOKEN = re.compile(r"\s*(~?\s*[A-Za-z_][A-Za-z_0-9]*|\d+|->|[()\[\]~,=])")
#: Groups in one another: each is padded for itself, and three levels are the most that any kernel has.
_DEEPEST = 50


@dataclass(frozen=True, slots=True)
class Group:
    """Digits of one index by name, most significant first; ``~`` before the name: counted backwards.

    A group within a group has an extent, and a ragged end, of its own.
    """

    items: tuple[str | Group, ...]

    def __str__(self) -> str:
        return f"({' '.join(map(str, self.items))})"

    def tokens(self) -> Iterator[str]:
        for item in self.items:
            yield from item.tokens() if isinstance(item, Group) else (item,)

    def digits(self) -> list[str]:
        return [token.removeprefix("~") for token in self.tokens()]


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a line: a dim an item, outermost first.

    ``flat``: written in brackets, or without any parentheses on the right. Then the digits are the order of the memory alone,
    and the dims are those of the other side, padded.
    """

    dims: tuple[Group, ...]
    flat: bool = False

    def digits(self) -> list[str]:
        return Group(self.dims).digits()

    def text(self, *, grouped: bool) -> str:
        """``grouped``: with parentheses somewhere, so that a right side is not read as flat."""
        if self.flat:
            names = " ".join(Group(self.dims).tokens())
            return f"[{names}]" if grouped else names
        bare = [dim.items[0] if len(dim.items) == 1 and isinstance(dim.items[0], str) else str(dim) for dim in self.dims]
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
        left, right = (set(Group(side.dims).tokens()) for side in (self.left, self.right))
        return {token.removeprefix("~") for token in left ^ right}

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
    if "(" not in tokens[arrow:comma]:
        right = Side((Group(tuple(Group(right.dims).tokens())),), flat=True)
    names = left.digits()
    line = Line(left, right, tuple((name, given[name]) for name in names if name in given))
    _check(line, text)
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


def _side(tokens: Sequence[str], text: str) -> Side:
    if tokens and tokens[0] == "[":
        if tokens[-1] != "]" or {"(", ")", "["} & set(tokens[1:]):
            raise LayoutError("brackets hold all digits of a side and no parentheses", expected="[g a b k]", found=text)
        return Side((_group(tokens[1:-1], text),), flat=True)
    return Side(tuple(item if isinstance(item, Group) else Group((item,)) for item in _group(tokens, text).items))


def _group(tokens: Sequence[str], text: str) -> Group:
    open_groups: list[list[str | Group]] = [[]]
    for token in tokens:
        if token == "(":
            if len(open_groups) > _DEEPEST:
                raise LayoutError("groups of a layout are nested too deep", expected=f"at most {_DEEPEST} deep", found=text[:80])
            open_groups.append([])
        elif token == ")":
            inner = Group(tuple(open_groups.pop()))
            if not open_groups:
                raise LayoutError("a layout has a closing parenthesis too many", found=text)
            open_groups[-1].append(inner)
        elif not token.removeprefix("~").isidentifier():
            raise LayoutError("a layout names its digits", expected="a name", found=text)
        else:
            open_groups[-1].append(token)
    if len(open_groups) > 1:
        raise LayoutError("a layout has an open parenthesis that is not closed", found=text)
    return Group(tuple(open_groups[0]))


def _check(line: Line, text: str) -> None:
    left, right = line.left.digits(), line.right.digits()
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


def fixed_size(item: str | Group, sizes: Mapping[str, int]) -> int | None:
    """The product of its sizes, or None where one of them is free."""
    digits = Group((item,)).digits()
    return math.prod(sizes[name] for name in digits) if sizes.keys() >= set(digits) else None
