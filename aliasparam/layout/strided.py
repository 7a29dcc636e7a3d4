"""Digit permutations bound to a shape, executed as strided copies."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, reduce
from typing import TypeAlias

import torch
from torch import Tensor

from . import triton_copy, triton_sum
from .blocks import blocks, permutation
from .bound import BoundLayout, in_bytes
from .boxes import Box, pieces, row_major, sizes, whole
from .digits import BoundLine, Piece
from .execute import WIDEST, Copy, alignment, for_torch, plan, views

#: What a copy may be: bytes of its widest element, and from how many bytes on it may run backwards (None: never).
Limits: TypeAlias = tuple[int, int | None]
TORCH: Limits = (WIDEST, None)
TRITON: Limits = (triton_copy.WIDEST, triton_copy.SMALLEST)
_SUMS: Limits = (triton_sum.WIDEST, 0)


class StridedLayout(BoundLayout):
    """Lines, one after the other. Made by ``Layout.bind``."""

    def __init__(self, lines: Sequence[BoundLine], shape: tuple[int, ...], lead: int, dtype: torch.dtype) -> None:
        super().__init__(shape, dtype, lead, lines[-1].kernel_shape[lead:])
        self.lines = lines
        self.is_identity = self.region_capacity == self.region_elements and self._keeps_places()

    def _keeps_places(self) -> bool:
        """Whether every element is where it was; lines that undo one another may be more than one."""
        if len(self.lines) == 1:
            return self.lines[0].start == 0 and all(digit.kernel == digit.value for digit in self.lines[0].digits)
        found = pieces(self.lines, self.shape, self.whole, self.strides)
        return all(one.kernel == one.value and all(axis.kernel == axis.value for axis in one.axes) for one in found)

    def write(self, memory: Tensor, box: Box, value: Tensor) -> None:
        self._move(memory, box, in_bytes(value), write=True)

    def read(self, memory: Tensor, box: Box, out: Tensor | None = None) -> Tensor:
        if out is None or out.is_conj() or out.is_neg():
            fresh = self.read(memory, box, self.empty(memory, box))
            return fresh if out is None else out.detach().copy_(fresh)
        self._move(memory, box, out.detach() if out.requires_grad else out, write=False)
        return out

    def _move(self, memory: Tensor, box: Box, value: Tensor, *, write: bool) -> None:
        """Copy what is under ``box`` from or to ``value``. This is what every shard write pays."""
        size, region, shape = self.dtype.itemsize, 0, value.shape
        for (start, stop), stride, n, extent in zip(box, self.lead_strides, self.shape, shape, strict=False):
            region += start * stride
            if not 0 <= start <= stop <= n or stop - start != extent:
                self.check(memory, box, value)  # raises
        first, other = (int(memory.storage_offset()) + region) * size, int(value.storage_offset()) * size
        align = alignment(memory.data_ptr() + region * size | value.data_ptr() | first | other)
        limits = TRITON if memory.is_cuda and triton_copy.takes(memory, value) else TORCH
        copies = _planned(self, box[self.lead :], shape, value.stride(), value.dtype, align, limits)
        if memory.dtype is not self.dtype or memory.numel() < self.capacity:
            self.check(memory, box, value)  # raises
        for copy, ours in copies:
            kernel, plain = views(copy.start if ours else copy, memory, first // size, value)
            if ours:
                triton_copy.run(copy, kernel, plain, write=write)
            elif write:
                kernel.copy_(plain)
            else:
                plain.copy_(kernel)

    def copies(
        self, core: Box, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, align: int, limits: Limits
    ) -> list[tuple[Copy, bool]]:
        """The copies between a value and memory from its box's first region on; and whether a kernel of our own runs each.

        Args:
            core: the box of the core dims.
            shape, strides, dtype: of the value; its leading dims are regions.
            align: bytes that both addresses are a multiple of.
            limits: of whoever copies.

        Raises:
            LayoutError: a box or value that does not fit.
        """
        box = (*whole(shape[: self.lead]), *core)
        self.check_value(box, shape, dtype)
        copies = plan(pieces(self.lines, self.shape, box, strides), dtype.itemsize, align, *limits)
        ours = [limits is _SUMS or (limits is TRITON and triton_copy.wanted(copy)) for copy in copies]
        return [(copy if mine else for_torch(copy, dtype), mine) for copy, mine in zip(copies, ours, strict=True)]

    def positions(self, at: Tensor) -> Tensor:
        return reduce(lambda at, line: line.offsets(at), self.lines, at)

    def positional_sums(self, memory: Tensor, box: Box) -> Tensor | None:
        if not triton_copy.takes(memory, memory) or not all(stop > start for start, stop in box):
            return None
        size, shape = self.dtype.itemsize, sizes(box)
        region = sum(start * stride for (start, _), stride in zip(box, self.lead_strides, strict=False))
        first = (int(memory.storage_offset()) + region) * size
        align = alignment(memory.data_ptr() + region * size | first)
        copies = _planned(self, box[self.lead :], shape, tuple(row_major(shape)), self.dtype, align, _SUMS)
        sums = [triton_sum.sums(copy, views(copy.start, memory, first // size, memory)[0]) for copy, _ in copies]
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)

    def reorder(self, memory: Tensor, new: BoundLayout, max_bytes: int) -> None:
        """In blocks of at most ``max_bytes``, where both orders pad alike and digits that both keep in place allow it."""
        if self is new or (self.is_identity and new.is_identity):
            return
        moves = _moves(self, new) if isinstance(new, StridedLayout) else None  # a table is kept by nothing
        if moves is None:
            super().reorder(memory, new, max_bytes)
            return
        first, size = int(memory.storage_offset()), self.dtype.itemsize
        align = alignment(memory.data_ptr() | first * size)
        for block in blocks(moves, max_bytes // size):
            _permute([views(copy, memory, first, memory) for copy in plan([block], size, align)])
        new.clear_padding(memory)

    def moves(self, new: StridedLayout) -> Piece | None:
        """See :func:`permutation`."""
        return None if len(self.lines) > 1 or len(new.lines) > 1 else permutation(self.lines[0], new.lines[0])


def _permute(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Put what is in the second of each pair into the first; scratch ends with the call."""
    for there, value in [(there, here.clone()) for there, here in pairs]:
        there.copy_(value)


#: A model writes the same few shards of a shape over and over, and declares the same shapes.
_planned, _moves = lru_cache(maxsize=1 << 14)(StridedLayout.copies), lru_cache(maxsize=1 << 12)(StridedLayout.moves)
