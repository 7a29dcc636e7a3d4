"""The notation: lines such as ``(g b a) k -> g a b k, a=4 b=8`` as two sides of digits, with the sizes that are fixed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise

from ..errors import LayoutError

_NAME = "[A-Za-z_][A-Za-z_0-9]*"
_TOKEN = re.compile(rf"~?\s*{_NAME}|[()\[\]]")
_SIZE = re.compile(rf"({_NAME})\s*=\s*(\d+)")
#: Groups in one another: each is padded for itself, and three levels are the most that any kernel has.
_DEEPEST = 50


@dataclass(frozen=True, slots=True)
class Group:
    """Digits of one index by name, most significant first. Or the dims of one side.

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

    def digits(self) -> list[str]:
        return [name for item in self.items for name in (item.digits() if isinstance(item, Group) else [item])]


@dataclass(frozen=True, eq=False)
class Line:
    """A line. Equality is by canonical form.

    ``sizes`` holds the digits whose size is fixed; ``flipped`` are those that the two sides count in opposite directions.

    Raises:
        LayoutError: the sides have other digits, or sizes are missing.
    """

    left: Group
    right: Group
    sizes: Mapping[str, int] = field(default_factory=dict)
    flipped: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        _need_alike(self)
        for name, size in self.sizes.items():
            if size < 1:
                raise LayoutError(f"the size of digit {name} is no positive integer", found=size)
        for dim in self.shape_side.dims:
            _need_sizes(dim, self)

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={self.sizes[name]}" for name in self.left.digits() if name in self.sizes)
        right = self.right.side(grouped=not self.right.flat)
        right = re.sub(_NAME, lambda name: "~" * (name[0] in self.flipped) + name[0], right)
        line = f"{self.left.side(grouped=self.left.flat)} -> {right}"
        return f"{line}, {sizes}" if sizes else line

    def exchanged(self) -> Line:
        return Line(self.right, self.left, self.sizes, self.flipped)

    @property
    def shape_side(self) -> Group:
        """The side whose groups give sizes to the digits."""
        return self.right if self.left.flat else self.left

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Line) and self._canonical == other._canonical

    def __hash__(self) -> int:
        return hash(self._canonical)

    @cached_property
    def _canonical(self) -> str:
        """Names by position, ones dropped, and digits joined that follow one another on both sides."""
        sizes = dict(self.sizes)
        # Every dim is in parentheses: digits follow one another only within a group.
        texts = [" ".join(map(str, side.dims)) for side in (self.left, self.right)]
        left, right = ([t for t in re.findall(r"\w+|[()]", text) if sizes.get(t) != 1] for text in texts)
        for first, second in list(pairwise(left)):
            alike = first in sizes and second in sizes and (first in self.flipped) == (second in self.flipped)
            if alike and (first, second) in pairwise(right):
                sizes[second] *= sizes.pop(first)
                left.remove(first)
                right.remove(first)
        order = {name: at for at, name in enumerate(token for token in left if token not in "()")}
        named = [[order.get(token, token) for token in tokens] for tokens in (left, right)]
        return str((named, self.left.flat, self.right.flat, [(sizes.get(name), name in self.flipped) for name in order]))


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


def _need_sizes(group: Group, line: Line) -> None:
    free = [str(item) for item in group.items if fixed_size(item, line.sizes) is None]
    if len(free) > 1:
        raise LayoutError(
            f"digits {' and '.join(free)} of one group have no size", expected=f"a size for all but one of {group}", found=line
        )
    for item in group.items:
        if isinstance(item, Group):
            _need_sizes(item, line)


@lru_cache(maxsize=1024)  # modules declare the same few lines over and over
def parse(text: str, given: tuple[tuple[str, int], ...] = ()) -> tuple[tuple[Line, ...], int | None]:
    """The lines of ``text``, with the sizes ``given`` beside those in it; and ``bits``, the width of elements.

    Raises:
        LayoutError: the text is no layout.
    """
    beside, lines, bits = dict(given), list[Line](), None
    unused = beside.keys() - {"bits"}
    for part in text.split("|"):
        sides, _, after = part.partition(",")
        sizes = _sizes(after, text) | beside
        bits = sizes.pop("bits", bits)
        line = _line(sides, sizes, text)
        unused = (unused | sizes.keys() - beside.keys()) - set(line.left.digits())
        lines.append(line)
    if unused:
        raise LayoutError("sizes for digits that the line lacks", found=sorted(unused), expected=text)
    return tuple(lines), bits


def _sizes(said: str, text: str) -> dict[str, int]:
    sizes = _SIZE.findall(said)
    if _SIZE.sub("", said).strip(" ,"):
        raise LayoutError("the sizes of a layout do not parse", expected="a=4 b=8", found=text)
    if len(dict(sizes)) < len(sizes):
        raise LayoutError("a digit has two sizes", found=text)
    return {name: int(size) for name, size in sizes}


def _line(sides: str, sizes: Mapping[str, int], text: str) -> Line:
    if sides.count("->") != 1:
        raise LayoutError("a layout has one arrow between its two sides", expected="(g b a) k -> g a b k, a=4 b=8", found=text)
    if strange := _TOKEN.sub("", sides.replace("->", "|")).strip(" |"):
        raise LayoutError("a layout has an unexpected character", expected="names, ( ) [ ] ~ -> , =", found=strange)
    before, after = (["".join(token.split()) for token in _TOKEN.findall(side)] for side in sides.split("->"))
    left, right = _side(before, text), _side(after, text, flat="(" not in after)
    flipped = frozenset(token.lstrip("~") for token in {*before} ^ {*after} if token[0] == "~")
    return Line(left, right, {name: sizes[name] for name in left.digits() if name in sizes}, flipped)


def _side(tokens: Sequence[str], text: str, *, flat: bool = False) -> Group:
    if {"[", "]"} & set(tokens):
        if tokens[0] != "[" or tokens[-1] != "]" or set("()[]") & set(tokens[1:-1]):
            raise LayoutError("brackets hold all digits of a side and no parentheses", expected="[g a b k]", found=text)
        tokens, flat = tokens[1:-1], True
    open_groups: list[list[str | Group]] = [[]]
    for token in tokens:
        if token == "(":
            open_groups.append([])
        elif token == ")":
            inner = open_groups.pop()
            if not open_groups:
                raise LayoutError("a layout has a closing parenthesis too many", found=text)
            open_groups[-1].append(inner[0] if len(inner) == 1 else Group(tuple(inner)))  # a digit alone is that digit
        else:
            open_groups[-1].append(token.lstrip("~"))
        if len(open_groups) > _DEEPEST:
            raise LayoutError("groups of a layout are nested too deep", expected=f"at most {_DEEPEST} deep", found=text[:80])
    if len(open_groups) > 1:
        raise LayoutError("a layout has an open parenthesis that is not closed", found=text)
    return Group(tuple(open_groups[0]), flat)
