"""A layout bound to one shape and dtype: what a storage holds, and what all kinds of it share."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import LayoutError
from .blocks import Cut, blocks, lead_cuts, tiles
from .boxes import Box, row_major


class BoundLayout(ABC):
    """Immutable; shared by all tensors of one layout, shape and dtype.

    A box is (start, stop) per dim of ``shape``. ``memory`` is a flat tensor of ``dtype``, ``regions * region_capacity`` elements.

    Attributes:
        shape, dtype: of the checkpoint tensor. Its first ``lead`` dims number the regions.
        regions: how many there are; each has ``region_elements`` values in ``region_capacity`` elements of memory.
        kernel_shape: full, lead dims in front.
        whole: the box of the whole tensor.
        is_identity: kernel memory is the contiguous checkpoint tensor.
        unit: contiguous bytes that stay together in both orders.
    """

    is_identity: bool = False
    unit: int = 1

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, lead: int, kernel: Sequence[int], capacity: int) -> None:
        self.shape, self.dtype, self.lead, self.region_capacity = shape, dtype, lead, capacity
        self.kernel_shape = (*shape[:lead], *kernel)
        self.regions, self.region_elements = math.prod(shape[:lead]), math.prod(shape[lead:])
        self.whole: Box = tuple((0, n) for n in shape)
        self.lead_strides = [stride * capacity for stride in row_major(shape[:lead])]

    def __deepcopy__(self, memo: Any) -> BoundLayout:
        return self

    @abstractmethod
    def write(self, memory: Tensor, box: Box, value: Tensor) -> None:
        """Put ``value`` (the box's shape, any strides) in its place in ``memory``. Raises LayoutError for what does not fit."""

    @abstractmethod
    def read(self, memory: Tensor, box: Box, out: Tensor | None = None) -> Tensor:
        """The values of ``box``: fresh and contiguous, or in ``out`` (any strides)."""

    @abstractmethod
    def offsets(self, box: Box | None = None) -> Tensor:
        """int64, the box's shape: the position of every element in ``memory``. Slow: for oracles, deltas and digests."""

    def positions(self, at: Tensor) -> Tensor | None:
        """Where the elements at row-major checkpoint positions ``at`` (int64, any shape and device) are in ``memory``.

        None where elements have no places of their own (nibbles, two functions). Costs a few times ``at``, not the tensor.
        """
        return None

    def positional_sums(self, memory: Tensor, box: Box) -> Tensor | None:
        """int64 ``[2]`` on the memory's device: the sum of the bytes of ``box``, and that of each times its position among the
        box's row-major bytes, congruent mod 65521. None where they must be gathered for it.
        """
        return None

    def encode(self, values: Tensor) -> Tensor:
        """``values`` (of ``shape``) as a tensor of their own in kernel order, of ``kernel_shape``; padding is zero."""
        memory = torch.zeros(self.regions * self.region_capacity, dtype=self.dtype, device=values.device)
        self.write(memory, self.whole, values)
        return memory.view(self.kernel_shape)

    def decode(self, kernel: Tensor) -> Tensor:
        """The inverse: fresh values of ``shape`` from a contiguous tensor in kernel order."""
        return self.read(kernel.reshape(-1), self.whole)

    def cuts(self, other: BoundLayout) -> list[Cut]:
        """Digits inside a region that this order and ``other`` keep in place."""
        return []

    def pieces(self, max_bytes: int) -> Iterator[Box]:
        """Boxes that tile the tensor, each of at most ``max_bytes`` of values (or one element)."""
        yield from tiles(self.whole, max(max_bytes // self.dtype.itemsize, 1))

    def in_place_blocks(self, other: BoundLayout, max_bytes: int) -> Iterator[list[Box]]:
        """Blocks of boxes whose memory no other block touches, under this order and under ``other``.

        Reading all boxes of a block in this order and writing them in the other, block by block, brings memory from the one to
        the other in place. A block has at most ``max_bytes`` where digits that both keep in place allow it; one block is
        everything where the capacities of a region differ. Padding that only the new order has holds old bytes afterwards:
        ``clear_padding``.
        """
        keep = self.region_capacity == other.region_capacity and (self.shape, self.lead) == (other.shape, other.lead)
        found = [*lead_cuts(self.shape, self.lead), *self.cuts(other)] if keep else []
        yield from blocks(self.shape, found, max_bytes // self.dtype.itemsize)

    def clear_padding(self, memory: Tensor) -> None:
        """Zero what no element of the tensor reaches. Scratch: a region."""
        if self.region_capacity == self.region_elements:
            return
        for box in self.region_boxes():
            values = self.read(memory, box)
            for region, _ in self.touched(memory, box):
                region.view(torch.uint8).zero_()
            self.write(memory, box, values)

    def region_boxes(self) -> Iterator[Box]:
        """The box of every region, in order."""
        for index in itertools.product(*(range(n) for n in self.shape[: self.lead])):
            yield (*((i, i + 1) for i in index), *self.whole[self.lead :])

    def touched(self, memory: Tensor, box: Box) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
        """The memory of every region under ``box``, flat, and its index in the box: ``value[index]`` are its values."""
        by_region = memory[: self.regions * self.region_capacity].view(*self.shape[: self.lead], self.region_capacity)
        for index in itertools.product(*(range(stop - start) for start, stop in box[: self.lead])):
            yield by_region[tuple(start + i for (start, _), i in zip(box, index, strict=False))], index

    def empty(self, memory: Tensor, box: Box) -> Tensor:
        return torch.empty([stop - start for start, stop in box], dtype=self.dtype, device=memory.device)

    def check(self, memory: Tensor, box: Box, value: Tensor) -> None:
        """Raises LayoutError unless the box lies in the tensor, the value fits it and the memory is large enough."""
        if len(box) != len(self.shape) or not all(0 <= a <= b <= n for (a, b), n in zip(box, self.shape, strict=True)):
            raise self.unfit(f"start and stop in each dim of {list(self.shape)}", box)
        if value.shape != torch.Size([stop - start for start, stop in box]) or value.dtype is not self.dtype:
            raise self.unfit(f"{self.dtype} values of box {box}", f"{value.dtype} {list(value.shape)}")
        if memory.dtype is not self.dtype or memory.numel() < self.regions * self.region_capacity:
            found = f"{memory.numel()} of {memory.dtype}"
            raise self.unfit(f"memory of {self.regions * self.region_capacity} elements of {self.dtype}", found)

    def unfit(self, expected: object, found: object) -> LayoutError:
        return LayoutError(f"this does not fit a layout of {list(self.shape)}", expected=expected, found=found)

    def placed(self, box: Box, within: Tensor, capacity: int) -> Tensor:
        """Offsets in a region of ``capacity`` positions, as offsets in the whole memory."""
        region = torch.zeros((), dtype=torch.int64)
        for (start, stop), stride in zip(box, row_major(self.shape[: self.lead]), strict=False):
            region = region[..., None] + torch.arange(start, stop) * stride
        return region.reshape(*region.shape, *[1] * within.dim()) * capacity + within
