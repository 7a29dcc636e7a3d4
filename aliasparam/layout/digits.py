"""Lines bound to a shape: every digit with its size and its place value in both orders.

[Note: place values] Both orders count elements by one number: the row-major position in the checkpoint tensor, and the offset in
kernel memory. A position x is written in digits from the most significant on: digit = x // v and x = x % v, with v the digit's
place value in the checkpoint. The offset is ``start`` plus the sum of digit * k, with k its place value in kernel memory,
negative where it is counted backwards. Padding needs no more than that: it is the part of a digit's size that no x reaches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from ..errors import LayoutError
from .pattern import Group, Line, fixed_size


class Axis(NamedTuple):
    """``size`` steps: of ``kernel`` elements of memory and ``value`` elements of the other side each."""

    size: int
    kernel: int
    value: int


class Piece(NamedTuple):
    """Elements ``value + sum(i * axis.value)`` of a rectangle, at ``kernel + sum(i * axis.kernel)`` of the memory."""

    kernel: int
    value: int
    axes: Sequence[Axis]


def joined(axes: Iterable[Axis]) -> list[Axis]:
    """With axes as one that follow one another, the second within the first, on both sides."""
    found: list[Axis] = []
    for axis in axes:
        if found and found[-1].kernel == axis.kernel * axis.size and found[-1].value == axis.value * axis.size:
            axis = axis._replace(size=found.pop().size * axis.size)
        found.append(axis)
    return found


class BoundLine(NamedTuple):
    """A line for one shape. ``digits``: the most significant of a position first. See [Note: place values]."""

    start: int
    digits: Sequence[Axis]
    kernel_shape: tuple[int, ...]

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
    lead, shape = tuple(shape[: len(shape) - dims]), tuple(shape)
    done: list[BoundLine] = []
    for line in lines:
        bound = _of_regions(lead, _bind(line, shape[len(lead) :]), shape)
        both = _composed(done[-1], bound) if done else None
        done[len(done) - (both is not None) :] = [both or bound]
        shape = bound.kernel_shape
    return done


def _of_regions(lead: tuple[int, ...], line: BoundLine, shape: tuple[int, ...]) -> BoundLine:
    """The line of one region for all, which the first dims of ``shape`` number: they are its most significant digits."""
    kernel_shape = (*lead, *line.kernel_shape)
    if not math.prod(kernel_shape):
        return BoundLine(0, (), kernel_shape)
    regions = map(Axis, lead, row_major(kernel_shape), row_major(shape))
    return BoundLine(line.start, _reached([*regions, *line.digits]), kernel_shape)


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
    digits = [Axis(size[n], -kernel[n] if n in line.flipped else kernel[n], source[n]) for n in line.left.digits()]
    start = sum((a.size - 1) * -a.kernel for a in digits if a.kernel < 0)
    return BoundLine(start, digits, padded if line.right.flat else grouped)


def _sized(
    line: Line, group: Group, shape: tuple[int, ...], dim: int, extent: int, stride: int
) -> Iterator[tuple[str, int, int]]:
    """Digits of ``group``, with size and place value, where it counts ``extent`` values that are ``stride`` positions apart."""
    sizes = [fixed_size(item, line.sizes) for item in group.items]
    rest = math.prod(size for size in sizes if size is not None)
    free = sizes.index(None) if None in sizes else None
    if extent != rest if free is None else free and extent % rest:
        said = " ".join(f"{name}={line.sizes[name]}" for name in group.digits() if name in line.sizes)
        raise LayoutError(
            f"the digits {group} ({said}) do not fit {extent}, dim {dim} of {list(shape)}",
            expected=f"{rest}" if free is None else f"a multiple of {rest}",
            found=extent,
            remedy=None if free is None else f"Pad it to {-(-extent // rest) * rest}, or give the digits other sizes.",
        )
    for item, fixed_to in zip(reversed(group.items), reversed(sizes), strict=True):
        size = -(-extent // rest) if fixed_to is None else fixed_to
        yield from _sized(line, item, shape, dim, size, stride) if isinstance(item, Group) else [(item, size, stride)]
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
    digits = side.digits()
    return dict(zip(digits, row_major([sizes[digit] for digit in digits]), strict=True))


def forwards(piece: Piece) -> Piece:
    """The same elements with no axis that runs backwards in kernel memory."""
    for i, (size, kernel, value) in enumerate(piece.axes):
        if kernel < 0:
            axes = [*piece.axes[:i], Axis(size, -kernel, -value), *piece.axes[i + 1 :]]
            piece = Piece(piece.kernel + (size - 1) * kernel, piece.value + (size - 1) * value, axes)
    return piece


def exchanged(piece: Piece) -> Piece:
    """With the two sides in one another's place."""
    return Piece(piece.value, piece.kernel, [Axis(a.size, a.value, a.kernel) for a in piece.axes])


def routed(piece: Piece, line: BoundLine, *, ragged: bool = False) -> list[Piece]:
    """The pieces of one piece at positions of ``line``, in its kernel memory; values run forwards.

    ``ragged``: axes may reach beyond their size where that takes fewer pieces.
    """
    found = _route(forwards(piece), line.start, line.digits, ragged)
    return [exchanged(forwards(exchanged(part))) if any(a.value < 0 for a in part.axes) else part for part in found]


def _route(piece: Piece, start: int, digits: Sequence[Axis], ragged: bool) -> Iterator[Piece]:
    """The same after positions were written in ``digits``. See [Note: place values]."""
    if not digits:
        yield piece._replace(kernel=start)
        return
    (_, kernel, value), *rest = digits
    for part in _divide(piece, value, ragged):
        high = [a._replace(kernel=a.kernel // value * kernel) for a in part.axes if a.kernel % value == 0]
        low = Piece(part.kernel % value, part.value, [a for a in part.axes if a.kernel % value])
        for inner in _route(low, start + part.kernel // value * kernel, rest, ragged):
            yield inner._replace(axes=[*high, *inner.axes])


def _divide(piece: Piece, value: int, ragged: bool) -> Iterator[Piece]:
    """Split until positions are ``value`` times (some axes) plus a remainder (the others) that never reaches ``value``."""
    at, offset, axes = piece
    low = [a for a in axes if a.kernel % value]
    reach = sum((a.size - 1) * a.kernel for a in low)
    if not low or at % value + reach < value:
        yield piece
        return
    cut = max(low, key=lambda a: a.kernel)
    size, unit, step = cut
    others = [a for a in axes if a is not cut]
    if unit < value and value % unit == 0 and at % unit + reach - (size - 1) * unit < unit:
        period = value // unit  # whole blocks of so many steps, and what is before and after them
        head = min(-(at // unit) % period, size)
        blocks, tail = divmod(size - head, period)
        if ragged and tail and not head and step > 0:
            blocks, tail = blocks + 1, 0
        cuts = [(0, 1, head), (head, blocks, period), (size - tail, 1, tail)]
    else:
        cuts = [(i, 1, 1) for i in range(size)]
    for first, blocks, run in cuts:
        if not blocks or not run:
            continue
        parts = [a for a in (Axis(blocks, unit * run, step * run), Axis(run, unit, step)) if a.size > 1]
        yield from _divide(Piece(at + first * unit, offset + first * step, [*others, *parts]), value, ragged)


def _composed(first: BoundLine, second: BoundLine) -> BoundLine | None:
    """One line, or None: a digit of the one straddles two of the other (halves of 192 rows in tiles of 128)."""
    ends = (axis._replace(size=min(axis.size, -(-above.value // axis.value))) for above, axis in pairwise(first.digits))
    found = routed(Piece(first.start, 0, [*first.digits[:1], *ends]), second, ragged=True)  # as far as positions reach
    if len(found) > 1:
        return None
    return BoundLine(found[0].kernel, _reached(sorted(found[0].axes, key=lambda a: -a.value)), second.kernel_shape)


def row_major(shape: Sequence[int]) -> list[int]:
    """Element strides of a contiguous tensor."""
    strides = [1] * len(shape)
    for dim in reversed(range(len(shape) - 1)):
        strides[dim] = strides[dim + 1] * max(shape[dim + 1], 1)
    return strides
