"""Lines bound to a shape: every digit with its size and its place value in both orders.

[Note: place values] Both orders count elements by one number: the row-major position in the checkpoint tensor, and the offset in
kernel memory. A position x is written in digits from the most significant on: digit = x // v and x = x % v, with v the digit's
place value in the checkpoint. The offset is ``start`` plus the sum of digit * k, with k its place value in kernel memory,
negative where it is counted backwards. Padding needs no more than that: it is the part of a digit's size that no x reaches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

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

    def offsets(self, at: Tensor) -> Tensor:
        """Where the elements at positions ``at`` are in kernel memory."""
        found = at.new_full(at.shape, self.start)
        for _, kernel, value in self.digits:
            found += at // value * kernel
            at = at % value
        return found


def core_dims(lines: Sequence[Line]) -> int:
    """How many of the last dims the lines order."""
    return len(lines[0].shape_side.dims)


def bind_lines(lines: Sequence[Line], shape: Sequence[int]) -> list[BoundLine]:
    """Lines, one after the other, for a tensor of ``shape``, whose last dims they order: in as few lines as say the same.

    Raises:
        LayoutError: the digits do not fit.
    """
    dims = core_dims(lines)
    if len(shape) < dims:
        text = " | ".join(map(str, lines))
        raise LayoutError(f"{text} takes {dims} dims", expected=f"{dims} or more dims", found=f"{list(shape)}")
    core = tuple(shape[len(shape) - dims :])
    done: list[BoundLine] = []
    for line in lines:
        bound = _bind(line, core)
        both = _composed(done[-1], bound) if done else None
        done[len(done) - (both is not None) :] = [both or bound]
        core = bound.kernel_shape
    return done


def _bind(line: Line, shape: tuple[int, ...]) -> BoundLine:
    groups = line.shape_side.dims
    if len(shape) != len(groups):
        raise LayoutError(f"{line} takes {len(groups)} dims", expected=f"{len(groups)} dims", found=f"{list(shape)}")
    strides = row_major(shape)
    found = [digit for dim, group in enumerate(groups) for digit in _sized(line, group, shape, dim, shape[dim], strides[dim])]
    size = {name: count for name, count, _ in found}
    source = {name: stride for name, _, stride in found}
    padded, grouped = (tuple(math.prod(size[d] for d in group.digits()) for group in dims) for dims in (groups, line.right.dims))
    if line.left.flat:
        if padded != shape:
            raise LayoutError(f"{line} takes whole tiles", expected=f"{list(padded)}", found=f"{list(shape)}")
        source = _places(line.left, size)
    kernel = _places(line.right, size)
    start, digits, flipped = 0, [], line.flipped
    for digit in line.left.digits() if math.prod(padded) else ():
        axis = Axis(size[digit], kernel[digit], source[digit])
        if digit in flipped:
            start, axis = start + (axis.size - 1) * axis.kernel, axis._replace(kernel=-axis.kernel)
        digits.append(axis)
    return BoundLine(start, _reached(digits), padded if line.right.flat else grouped)


def _sized(
    line: Line, group: Group, shape: tuple[int, ...], dim: int, extent: int, stride: int
) -> Iterator[tuple[str, int, int]]:
    """Digits of ``group``, with size and place value, where it counts ``extent`` values that are ``stride`` positions apart."""
    fixed = dict(line.sizes)
    sizes = [fixed_size(item, fixed) for item in group.items]
    rest = math.prod(size for size in sizes if size is not None)
    free = sizes.index(None) if None in sizes else None
    if extent != rest if free is None else free and extent % rest:
        said = " ".join(f"{name}={size}" for name, size in line.sizes if name in group.digits())
        raise LayoutError(
            f"the digits {group} ({said}) do not fit {extent}, dim {dim} of {list(shape)}",
            expected=f"{rest}" if free is None else f"a multiple of {rest}",
            found=extent,
            remedy=None if free is None else f"Pad it to {-(-extent // rest) * rest}, or give the digits other sizes.",
        )
    for item, fixed_to in zip(reversed(group.items), reversed(sizes), strict=True):
        size = -(-extent // rest) if fixed_to is None else fixed_to
        yield from _sized(line, item, shape, dim, size, stride) if isinstance(item, Group) else [(item.lstrip("~"), size, stride)]
        stride *= size


def _reached(digits: Iterable[Axis]) -> list[Axis]:
    """Without those that are the same for all positions: of one value, or no less significant than one before them."""
    found: list[Axis] = []
    for digit in digits:
        if digit.size != 1 and (not found or digit.value < found[-1].value):
            found.append(digit)
    return joined(found)


def _places(side: Group, sizes: dict[str, int]) -> dict[str, int]:
    """The place value of each digit in memory that has the digits of ``side`` in their order."""
    values, value = {}, 1
    for digit in reversed(side.digits()):
        values[digit] = value
        value *= sizes[digit]
    return values


def refined(digits: Iterable[Axis], places: Iterable[int], *, exact: bool = False) -> dict[int, Axis]:
    """The digits by their place value, cut at other place values as well where these are whole steps of a digit.

    ``exact``: only those that cut a digit evenly.
    """
    found: dict[int, Axis] = {}
    end: float = math.inf
    for size, kernel, value in digits:
        high, even = value * size, True
        cuts = [place for place in places if value < place < min(high, end) and place % value == 0]
        for low in [*sorted(cuts, reverse=True), value]:
            even = even and high % low == 0
            if even or not exact:
                found[low] = Axis(-(-high // low), kernel * (low // value), low)
            high = low
        end = value
    return found


def _composed(first: BoundLine, second: BoundLine) -> BoundLine | None:
    """One line, or None: a digit of the one straddles two of the other (halves of 192 rows in tiles of 128)."""
    start, digits, backwards = second.start, [], 0
    ends = {abs(digit.kernel) * n for digit in first.digits for n in (1, digit.size)}
    then = refined(second.digits, ends)
    for size, kernel, value in first.digits:
        parts = refined([Axis(size, value, abs(kernel))], then)
        if parts.keys() != {place for place in then if abs(kernel) <= place < abs(kernel) * size}:
            return None
        if kernel < 0:  # so is every part of it
            if math.prod(part.size for part in parts.values()) != size:
                return None
            backwards -= (size - 1) * kernel
            start += sum((part.size - 1) * then[place].kernel for place, part in parts.items())
        digits += [Axis(part.size, then[place].kernel * (1 if kernel > 0 else -1), part.kernel) for place, part in parts.items()]
    # What is counted backwards from an end that no element reaches does not begin where its parts do.
    return BoundLine(start, _reached(digits), second.kernel_shape) if first.start == backwards else None


def row_major(shape: Sequence[int]) -> list[int]:
    """Element strides of a contiguous tensor."""
    strides = [1] * len(shape)
    for dim in reversed(range(len(shape) - 1)):
        strides[dim] = strides[dim + 1] * max(shape[dim + 1], 1)
    return strides
