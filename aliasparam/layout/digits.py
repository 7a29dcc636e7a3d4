"""A line bound to one shape: every digit with its size and its place value in both orders.

[Note: place values] Both orders count elements by one number: the row-major position in the checkpoint tensor, and the offset in
kernel memory. A position x is written in digits from the most significant on: digit = x // v and x = x % v, with v the digit's
place value in the checkpoint. The offset is ``start`` plus the sum of digit * k, with k its place value in kernel memory,
negative where it is counted backwards. Padding needs no more than that: it is the part of a digit's size that no x reaches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import LayoutError
from .pattern import Group, Line, fixed_size


class Axis(NamedTuple):
    """``size`` steps: of ``kernel`` elements of memory and ``value`` elements of the other side each."""

    size: int
    kernel: int
    value: int


def joined(axes: Iterable[Axis]) -> list[Axis]:
    """With axes as one that follow one another, the second within the first, on both sides."""
    found: list[Axis] = []
    for axis in axes:
        if found and found[-1].kernel == axis.kernel * axis.size and found[-1].value == axis.value * axis.size:
            axis = axis._replace(size=found.pop().size * axis.size)
        found.append(axis)
    return found


class BoundLine(NamedTuple):
    """A line for one core shape. ``digits``: the most significant of a position first. See [Note: place values]."""

    start: int
    digits: Sequence[Axis]
    kernel_shape: tuple[int, ...]

    @property
    def capacity(self) -> int:
        return math.prod(self.kernel_shape)


@dataclass
class _Sizes:
    """What the groups and the shape say about the digits: sizes and place values in the checkpoint."""

    line: Line
    shape: tuple[int, ...]
    fixed: Mapping[str, int]
    capacity: dict[str, int]
    source: dict[str, int]

    def resolve(self, group: Group, extent: int, stride: int, dim: int) -> None:
        """Sizes of the digits of ``group``, which counts ``extent`` values that are ``stride`` positions apart."""
        sizes = [fixed_size(item, self.fixed) for item in group.items]
        rest = math.prod(size for size in sizes if size is not None)
        free = sizes.index(None) if None in sizes else None
        if extent != rest if free is None else free and extent % rest:
            self.refuse(group, rest, extent, dim, exact=free is None)
        extents = [-(-extent // rest) if size is None else size for size in sizes]
        for item, size in zip(reversed(group.items), reversed(extents), strict=True):
            if isinstance(item, Group):
                self.resolve(item, size, stride, dim)
            else:
                self.capacity[item.removeprefix("~")], self.source[item.removeprefix("~")] = size, stride
            stride *= size

    def refuse(self, group: Group, rest: int, extent: int, dim: int, *, exact: bool) -> None:
        sized = " ".join(f"{name}={size}" for name, size in self.line.sizes if name in group.digits())
        raise LayoutError(
            f"the digits {group} ({sized}) do not fit {extent}, dim {dim} of {list(self.shape)}",
            expected=f"{rest}" if exact else f"a multiple of {rest}",
            found=extent,
            remedy=None if exact else f"Pad it to {-(-extent // rest) * rest}, or give the digits other sizes.",
        )

    def place_values(self, digits: Sequence[str]) -> dict[str, int]:
        """In memory that has these digits, outermost first."""
        values, value = {}, 1
        for digit in reversed(digits):
            values[digit] = value
            value *= self.capacity[digit]
        return values


def bind_line(line: Line, shape: Sequence[int]) -> BoundLine:
    """Raises LayoutError where the digits do not fit ``shape`` (the core dims alone)."""
    shape = tuple(shape)
    groups = line.shape_side.dims
    if len(shape) != len(groups):
        raise LayoutError(f"{line} takes {len(groups)} dims", expected=f"{len(groups)} dims", found=f"{list(shape)}")
    sizes = _Sizes(line, shape, dict(line.sizes), {}, {})
    for dim, (group, extent, stride) in enumerate(zip(groups, shape, row_major(shape), strict=True)):
        sizes.resolve(group, extent, stride, dim)
    capacity = sizes.capacity
    padded, grouped = (
        tuple(math.prod(capacity[digit] for digit in group.digits()) for group in dims) for dims in (groups, line.right.dims)
    )
    if line.left.flat:
        if padded != shape:
            raise LayoutError(f"{line} takes whole tiles", expected=f"{list(padded)}", found=f"{list(shape)}")
        sizes.source = sizes.place_values(line.left.digits())
    kernel = sizes.place_values(line.right.digits())
    start, digits, flipped = 0, [], line.flipped
    for digit in line.left.digits():
        size, place = capacity[digit], kernel[digit]
        if digit in flipped:
            start, place = start + (size - 1) * place, -place
        if size != 1:
            digits.append(Axis(size, place, sizes.source[digit]))
    return BoundLine(start, joined(digits), padded if line.right.flat else grouped)


def row_major(shape: Sequence[int]) -> list[int]:
    """Element strides of a contiguous tensor."""
    strides = [1] * len(shape)
    for dim in reversed(range(len(shape) - 1)):
        strides[dim] = strides[dim + 1] * max(shape[dim + 1], 1)
    return strides
