"""Digit permutations bound to a shape, executed as strided copies."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from . import triton_copy, triton_sum
from .blocks import Cut, common
from .bound import BoundLayout
from .boxes import Box, Piece, pieces, row_major
from .compose import compose
from .digits import BoundLine
from .execute import WIDEST, Copy, plan, views

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

#: Plans kept a bound layout. A model writes the same few shards of a shape over and over.
_PLANS = 512


class StridedLayout(BoundLayout):
    """Lines, one after the other. Made by ``Layout.bind``."""

    def __init__(self, lines: Sequence[BoundLine], shape: tuple[int, ...], lead: int, dtype: torch.dtype) -> None:
        super().__init__(shape, dtype, lead, lines[-1].kernel_shape, lines[-1].capacity)
        self._elements = self.regions * self.region_capacity
        self.lines = compose(list(lines))
        self._plans: OrderedDict[object, list[tuple[Copy, bool]]] = OrderedDict()
        self._pieces: OrderedDict[Box, list[Piece]] = OrderedDict()
        whole = plan(self.boxes(self.whole[lead:]), [], row_major(shape[lead:]), dtype.itemsize, dtype.itemsize)
        self.unit = _unit(whole, dtype.itemsize)
        padded = self.region_capacity != self.region_elements
        self.is_identity = not padded and (not whole or self.unit == self.region_elements * dtype.itemsize)

    def boxes(self, box: Box) -> list[Piece]:
        """The strided pieces of a box of the core dims."""
        found = self._pieces.get(box)
        if found is None:
            found = _keep(self._pieces, box, pieces(self.lines, self.shape[self.lead :], box))
        return found

    def write(self, memory: Tensor, box: Box, value: Tensor) -> None:
        if value.requires_grad or value.is_conj() or value.is_neg():  # such bits live on the tensor, not in its bytes
            value = value.detach().resolve_conj().resolve_neg()
        move(*self._planned(memory, box, value), memory, value, write=True)

    def read(self, memory: Tensor, box: Box, out: Tensor | None = None) -> Tensor:
        if out is None or out.is_conj() or out.is_neg():
            fresh = self.read(memory, box, self.empty(memory, box))
            return fresh if out is None else out.detach().copy_(fresh)
        value = out.detach() if out.requires_grad else out
        move(*self._planned(memory, box, value), memory, value, write=False)
        return out

    def _planned(self, memory: Tensor, box: Box, value: Tensor) -> tuple[list[tuple[Copy, bool]], int]:
        """The copies of a box, and the element of memory at which its first region begins."""
        size, region, shape = self.dtype.itemsize, 0, value.shape
        for (start, stop), stride, n, extent in zip(box, self.lead_strides, self.shape, shape, strict=False):
            region += start * stride
            if not 0 <= start <= stop <= n or stop - start != extent:
                self.check(memory, box, value)  # raises
        first, other = (int(memory.storage_offset()) + region) * size, int(value.storage_offset()) * size
        align = (memory.data_ptr() + region * size | value.data_ptr() | first | other | WIDEST) & 31
        by_kernel = memory.is_cuda and triton_copy.takes(memory, value)
        key = (box[self.lead :], shape, value.stride(), align & -align, value.dtype, by_kernel)
        copies = self._plans.get(key)
        if copies is None:
            self.check(memory, box, value)
            copies = _keep(self._plans, key, self.copies(box, value.stride(), align & -align, by_kernel=by_kernel))
        if memory.dtype is not self.dtype or memory.numel() < self._elements:
            self.check(memory, box, value)  # raises
        return copies, first // size

    def copies(self, box: Box, strides: Sequence[int], align: int, *, by_kernel: bool) -> list[tuple[Copy, bool]]:
        """The copies between a value of the box's shape with these ``strides`` and memory, from the region on in which the box
        begins; and whether our own kernel runs each. ``align``: bytes that both addresses are a multiple of."""
        sizes = [stop - start for start, stop in box]
        lead = list(zip(sizes, self.lead_strides, strict=False))
        found = self.boxes(box[self.lead :]) if all(sizes) else []
        limits = (triton_copy.WIDEST, triton_copy.SMALLEST) if by_kernel else (WIDEST, None)
        planned = plan(found, lead, strides, self.dtype.itemsize, align, *limits)
        return [(copy, True) if by_kernel and triton_copy.wanted(copy) else (self._named(copy), False) for copy in planned]

    def _named(self, copy: Copy) -> Copy:
        # For torch elements of their own width are of their own dtype: engines that mask ``Tensor.copy_`` look for NaN in them.
        return copy._replace(dtype=self.dtype) if copy.dtype.itemsize == self.dtype.itemsize > 1 else copy

    def offsets(self, box: Box | None = None) -> Tensor:
        box = box or self.whole
        within = torch.zeros((), dtype=torch.int64)
        for (start, stop), stride in zip(box[self.lead :], row_major(self.shape[self.lead :]), strict=True):
            within = within[..., None] + torch.arange(start, stop) * stride
        for line in self.lines:
            within = _through(line, within)
        return self.placed(box, within, self.region_capacity)

    def positions(self, at: Tensor) -> Tensor:
        within = at % max(self.region_elements, 1)
        region = at // max(self.region_elements, 1)
        for line in self.lines:
            within = _through(line, within)
        return region * self.region_capacity + within

    def positional_sums(self, memory: Tensor, box: Box) -> Tensor | None:
        if not triton_copy.takes(memory, memory) or not all(stop > start for start, stop in box):
            return None
        size, sizes = self.dtype.itemsize, [stop - start for start, stop in box]
        region = sum(start * stride for (start, _), stride in zip(box, self.lead_strides, strict=False))
        first = (int(memory.storage_offset()) + region) * size
        align = (memory.data_ptr() + region * size | first | triton_sum.WIDEST) & 31
        key = ("sums", box[self.lead :], tuple(sizes), align & -align)
        copies = self._plans.get(key)
        if copies is None:
            lead = list(zip(sizes, self.lead_strides, strict=False))
            found = plan(self.boxes(box[self.lead :]), lead, row_major(sizes), size, align & -align, triton_sum.WIDEST, 0)
            copies = _keep(self._plans, key, [(copy, True) for copy in found])
        sums = [triton_sum.sums(copy, views(copy.start, memory, first // size, memory)[0]) for copy, _ in copies]
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)

    def cuts(self, other: BoundLayout) -> list[Cut]:
        if not isinstance(other, StridedLayout) or len(self.lines) != 1 or len(other.lines) != 1:
            return []
        found = common(self.lines[0], other.lines[0], self.lead)
        return sorted(found, key=lambda c: -c.step * row_major(self.shape)[c.dim])  # long runs of the checkpoint first


def move(copies: list[tuple[Copy, bool]], first: int, memory: Tensor, value: Tensor, *, write: bool) -> None:
    """Carry out what :meth:`StridedLayout.copies` planned, for regions from element ``first`` of memory on."""
    for copy, by_kernel in copies:
        kernel, plain = views(copy.start if by_kernel else copy, memory, first, value)
        if by_kernel:
            triton_copy.run(copy, kernel, plain, write=write)
        elif write:
            kernel.copy_(plain)
        else:
            plain.copy_(kernel)


def _unit(copies: list[Copy], itemsize: int) -> int:
    """Bytes of the smallest innermost run of the copies."""
    runs = [c.sizes[-1] if c.sizes and c.kernel[-1] == c.value[-1] == 1 else 1 for c in copies]
    return itemsize * math.gcd(*runs) if runs else itemsize


def _keep(kept: OrderedDict[_Key, _Value], key: _Key, value: _Value) -> _Value:
    kept[key] = value
    if len(kept) > _PLANS:
        kept.popitem(last=False)
    return value


def _through(line: BoundLine, position: Tensor) -> Tensor:
    """Kernel positions of row-major positions, digit by digit. See [Note: place values]."""
    offset = torch.zeros_like(position)
    for stride, places in zip(row_major(line.shape), line.places, strict=True):
        coordinate, position = position // stride, position % stride
        for place in places:
            digit, coordinate = coordinate // place.source, coordinate % place.source
            offset += (place.capacity - 1 - digit if place.flipped else digit) * place.kernel
    return offset
