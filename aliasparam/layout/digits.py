"""A line bound to one shape: every digit with its size and its place value in both orders.

[Note: place values] A coordinate x of one dim is written in the digits of that dim: from the most significant on,
digit = x // s and x = x % s, with s the digit's place value in the checkpoint. The kernel offset is the sum of digit * k, with k
its place value in kernel memory. Padding needs no more than that: it is the part of a digit's capacity that no x reaches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import LayoutError
from .pattern import Digit, Group, Line, fixed_size


@dataclass(frozen=True, slots=True)
class Place:
    """A digit: its place values in checkpoint coordinate and kernel memory, how many values it has room for."""

    source: int
    kernel: int
    capacity: int
    flipped: bool


@dataclass(frozen=True, slots=True)
class BoundLine:
    """``line`` for one core shape. ``shape`` is how the input is looked at (flat where the left side says no dims)."""

    shape: tuple[int, ...]
    places: tuple[tuple[Place, ...], ...]  # per dim of `shape`, most significant first
    kernel_shape: tuple[int, ...]
    capacity: int


@dataclass
class _Sizes:
    """What the groups and the shape say about the digits."""

    line: Line
    shape: tuple[int, ...]
    fixed: Mapping[str, int]
    capacity: dict[str, int]
    source: dict[str, int]

    def resolve(self, group: Group, extent: int, stride: int, dim: int) -> None:
        """Sizes of the digits of ``group``, which counts ``extent`` values that are ``stride`` apart in their dim."""
        sizes = [fixed_size(item, self.fixed) for item in group.items]
        rest = math.prod(size for size in sizes if size is not None)
        free = sizes.index(None) if None in sizes else None
        if extent != rest if free is None else free and extent % rest:
            self.refuse(group, rest, extent, dim, exact=free is None)
        extents = [-(-extent // rest) if size is None else size for size in sizes]
        for item, size in zip(reversed(group.items), reversed(extents), strict=True):
            if isinstance(item, Digit):
                self.capacity[item.name], self.source[item.name] = size, stride
            else:
                self.resolve(item, size, stride, dim)
            stride *= size

    def refuse(self, group: Group, rest: int, extent: int, dim: int, *, exact: bool) -> None:
        sized = " ".join(f"{name}={size}" for name, size in self.line.sizes if name in {d.name for d in group.digits()})
        raise LayoutError(
            f"the digits {group} ({sized}) do not fit {extent}, dim {dim} of {list(self.shape)}",
            expected=f"{rest}" if exact else f"a multiple of {rest}",
            found=extent,
            remedy=None if exact else f"Pad it to {-(-extent // rest) * rest}, or give the digits other sizes.",
        )


def bind_line(line: Line, shape: Sequence[int]) -> BoundLine:
    """Raises LayoutError where the digits do not fit ``shape`` (the core dims alone)."""
    shape = tuple(shape)
    groups = line.shape_side.dims
    if len(shape) != len(groups):
        raise LayoutError(f"{line} takes {len(groups)} dims", expected=f"{len(groups)} dims", found=f"{list(shape)}")
    sizes = _Sizes(line, shape, dict(line.sizes), {}, {})
    for dim, (group, extent) in enumerate(zip(groups, shape, strict=True)):
        sizes.resolve(group, extent, 1, dim)
    padded = tuple(_product(group, sizes.capacity) for group in groups)
    if line.left.flat:
        if padded != shape:
            raise LayoutError(f"{line} takes whole tiles", expected=f"{list(padded)}", found=f"{list(shape)}")
        shape, groups = (math.prod(shape),), line.left.dims
        sizes.source = _place_values(groups[0], sizes.capacity)
    kernel = _place_values(Group(tuple(line.right.digits())), sizes.capacity)
    flipped = {d.name for d in line.left.digits() if d.flipped} ^ {d.name for d in line.right.digits() if d.flipped}
    places = tuple(
        tuple(
            Place(sizes.source[d.name], kernel[d.name], sizes.capacity[d.name], d.name in flipped)
            for d in group.digits()
            if sizes.capacity[d.name] != 1
        )
        for group in groups
    )
    kernel_shape = padded if line.right.flat else tuple(_product(group, sizes.capacity) for group in line.right.dims)
    return BoundLine(shape, places, kernel_shape, math.prod(padded))


def _product(group: Group, capacity: Mapping[str, int]) -> int:
    return math.prod(capacity[digit.name] for digit in group.digits())


def _place_values(group: Group, capacity: Mapping[str, int]) -> dict[str, int]:
    values, value = {}, 1
    for digit in reversed(list(group.digits())):
        values[digit.name] = value
        value *= capacity[digit.name]
    return values
