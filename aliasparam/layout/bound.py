"""A layout bound to one shape and dtype: writing, reading, and what follows from the digits."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ..errors import LayoutError
from .boxes import Piece, pieces, row_major
from .digits import BoundLine
from .execute import Copy, plan, views

Box = tuple[tuple[int, int], ...]

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

#: Plans kept a bound layout. A model writes the same few shards of a shape over and over.
_PLANS = 512


class BoundLayout(Protocol):
    """What a storage holds. Immutable; shared by all tensors of one layout, shape and dtype.

    Attributes:
        shape, dtype: of the checkpoint tensor. Its first ``lead`` dims number the regions.
        regions: how many regions there are; each has ``region_elements`` values in ``region_capacity`` elements of memory.
        kernel_shape: full, lead dims in front.
        is_identity: kernel memory is the contiguous checkpoint tensor.
        unit: contiguous bytes that stay together in both orders.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    lead: int
    regions: int
    region_elements: int
    region_capacity: int
    kernel_shape: tuple[int, ...]
    is_identity: bool
    unit: int

    def write(self, memory: Tensor, box: Box, value: Tensor) -> None:
        """Put ``value`` (the box's shape, any strides) in its place in ``memory`` (flat, kernel order)."""

    def read(self, memory: Tensor, box: Box, out: Tensor | None = None) -> Tensor:
        """The values of ``box``: fresh and contiguous, or in ``out``."""

    def offsets(self, box: Box | None = None) -> Tensor:
        """int64, the box's shape: the position of every element in ``memory``. Slow: for oracles, deltas and digests."""

    def pieces(self, max_bytes: int) -> Iterator[Box]:
        """Boxes that tile the tensor, each of at most ``max_bytes`` of values (one element at least)."""


class StridedLayout:
    """Digit permutations, executed as strided copies. Made by ``Layout.bind``."""

    def __init__(self, lines: Sequence[BoundLine], shape: tuple[int, ...], lead: int, dtype: torch.dtype) -> None:
        self.shape, self.dtype, self.lead = shape, dtype, lead
        self.core = shape[lead:]
        self.regions = math.prod(shape[:lead])
        self.region_elements = math.prod(self.core)
        self.region_capacity = lines[-1].capacity if lines else self.region_elements
        self.kernel_shape = shape[:lead] + (lines[-1].kernel_shape if lines else self.core)
        self._lines = tuple(lines)
        self._lead_strides = [stride * self.region_capacity for stride in row_major(shape[:lead])]
        self._plans: OrderedDict[object, list[Copy]] = OrderedDict()
        self._pieces: OrderedDict[Box, list[Piece]] = OrderedDict()
        whole = plan(self.boxes(tuple((0, n) for n in self.core)), [], row_major(self.core), dtype.itemsize, dtype.itemsize)
        self.unit = _unit(whole, dtype.itemsize)
        self.is_identity = self.region_capacity == self.region_elements and (
            self.unit == self.region_elements * dtype.itemsize or not self.region_elements
        )

    def boxes(self, box: Box) -> list[Piece]:
        """The strided pieces of a rectangle of the core dims."""
        found = self._pieces.get(box)
        if found is None:
            found = _keep(self._pieces, box, pieces(self._lines, self.core, box))
        return found

    def write(self, memory: Tensor, box: Box, value: Tensor) -> None:
        with torch.no_grad():
            for kernel, plain in self._views(memory, box, value):
                kernel.copy_(plain)

    def read(self, memory: Tensor, box: Box, out: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            if out is None:
                out = torch.empty([stop - start for start, stop in box], dtype=self.dtype, device=memory.device)
            for kernel, plain in self._views(memory, box, out):
                plain.copy_(kernel)
        return out

    def _views(self, memory: Tensor, box: Box, value: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        size, region = self.dtype.itemsize, 0
        for (start, _), stride in zip(box, self._lead_strides, strict=False):
            region += start * stride
        first = (memory.storage_offset() + region) * size
        align = (memory.data_ptr() + region * size | value.data_ptr() | first | value.storage_offset() * size | 16) & 31
        key = (box[self.lead :], value.shape, value.stride(), align & -align)
        copies = self._plans.get(key)
        if copies is None or not all(0 <= start <= stop <= n for (start, stop), n in zip(box, self.shape, strict=False)):
            copies = _keep(self._plans, key, self._plan(box, value, align & -align))
        if value.dtype is not self.dtype or memory.numel() < self.regions * self.region_capacity:
            raise self._unfit(f"{value.dtype} into {memory.numel()} elements", f"{self.dtype}, {self.regions * self.region_capacity}")
        for copy in copies:
            yield views(copy, memory, first, value)

    def _plan(self, box: Box, value: Tensor, align: int) -> list[Copy]:
        """Raises LayoutError unless the box lies in the tensor and the value has its shape."""
        if len(box) != len(self.shape) or not all(0 <= a <= b <= n for (a, b), n in zip(box, self.shape, strict=True)):
            raise self._unfit(box, f"start and stop for each dim of {list(self.shape)}")
        if value.shape != torch.Size([stop - start for start, stop in box]):
            raise self._unfit(list(value.shape), f"values of box {box}")
        if not value.numel():
            return []
        lead = list(zip(value.shape[: self.lead], self._lead_strides, strict=True))
        return plan(self.boxes(box[self.lead :]), lead, value.stride(), self.dtype.itemsize, align)

    def _unfit(self, found: object, expected: object) -> LayoutError:
        return LayoutError(f"this does not fit a tensor of {list(self.shape)}", expected=expected, found=found)

    def offsets(self, box: Box | None = None) -> Tensor:
        box = box or tuple((0, n) for n in self.shape)
        strides = [*row_major(self.shape[: self.lead]), *row_major(self.core)]
        grids = [torch.arange(start, stop) * stride for (start, stop), stride in zip(box, strides, strict=True)]
        region, within = (_sum(part) for part in (grids[: self.lead], grids[self.lead :]))
        for line in self._lines:
            within = _through(line, within)
        return region.reshape(*region.shape, *[1] * within.dim()) * self.region_capacity + within

    def pieces(self, max_bytes: int) -> Iterator[Box]:
        yield from tiles(tuple((0, n) for n in self.shape), max(max_bytes // self.dtype.itemsize, 1))


def tiles(box: Box, elements: int) -> Iterator[Box]:
    """``box`` cut along its first dims into boxes of at most ``elements`` elements."""
    rest = math.prod(stop - start for start, stop in box[1:])
    if not box or (box[0][1] - box[0][0]) * rest <= elements:
        if all(stop > start for start, stop in box):
            yield box
        return
    start, stop = box[0]
    many = max(elements // rest, 1)
    for first in range(start, stop, many):
        part = (first, min(first + many, stop))
        if rest * (part[1] - part[0]) <= elements:
            yield (part, *box[1:])
        else:
            yield from ((part, *inner) for inner in tiles(box[1:], elements))


def _unit(copies: list[Copy], itemsize: int) -> int:
    """Bytes of the smallest innermost run of the copies."""
    runs = [c.sizes[-1] if c.sizes and c.kernel[-1] == c.value[-1] == 1 else 1 for c in copies]
    return itemsize * math.gcd(*runs) if runs else itemsize


def _keep(kept: OrderedDict[_Key, _Value], key: _Key, value: _Value) -> _Value:
    kept[key] = value
    if len(kept) > _PLANS:
        kept.popitem(last=False)
    return value


def _sum(grids: Sequence[Tensor]) -> Tensor:
    total = torch.zeros((), dtype=torch.int64)
    for grid in grids:
        total = total[..., None] + grid
    return total


def _through(line: BoundLine, position: Tensor) -> Tensor:
    """Kernel positions of row-major positions, digit by digit. See [Note: place values]."""
    offset = torch.zeros_like(position)
    for stride, places in zip(row_major(line.shape), line.places, strict=True):
        coordinate, position = position // stride, position % stride
        for place in places:
            digit, coordinate = coordinate // place.source, coordinate % place.source
            offset += (place.capacity - 1 - digit if place.flipped else digit) * place.kernel
    return offset
