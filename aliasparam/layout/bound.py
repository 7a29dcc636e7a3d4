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
from .boxes import Box, box_in, positions_in, row_major, sizes, whole


class BoundLayout(ABC):
    """Immutable; shared by all tensors of one layout, shape and dtype.

    A box is (start, stop) per dim of ``shape``. ``memory`` is a flat tensor of ``dtype``, ``capacity`` elements.

    Attributes:
        shape, dtype: of the checkpoint tensor. Its first ``lead`` dims number the regions.
        regions: how many there are; each has ``region_elements`` values in ``region_capacity`` elements of memory.
        capacity: elements of memory of all regions.
        kernel_shape: full, lead dims in front.
        strides, kernel_strides: of contiguous tensors of these shapes.
        whole: the box of the whole tensor.
        is_identity: kernel memory is the contiguous checkpoint tensor.
    """

    is_identity: bool = False

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, lead: int, kernel: Sequence[int]) -> None:
        self.shape, self.dtype, self.lead, self.region_capacity = shape, dtype, lead, math.prod(kernel)
        self.kernel_shape = (*shape[:lead], *kernel)
        self.strides, self.kernel_strides = tuple(row_major(shape)), tuple(row_major(self.kernel_shape))
        self.regions, self.region_elements = math.prod(shape[:lead]), math.prod(shape[lead:])
        self.capacity = self.regions * self.region_capacity
        self.whole: Box = whole(shape)
        self.lead_strides = [stride * self.region_capacity for stride in row_major(shape[:lead])]

    def __deepcopy__(self, memo: Any) -> BoundLayout:
        return self

    @abstractmethod
    def write(self, memory: Tensor, box: Box, value: Tensor) -> None:
        """Put ``value`` (the box's shape, any strides) in its place in ``memory``. Raises LayoutError for what does not fit."""

    @abstractmethod
    def read(self, memory: Tensor, box: Box, out: Tensor | None = None) -> Tensor:
        """The values of ``box``: fresh and contiguous, or in ``out`` (any strides)."""

    def positions(self, at: Tensor) -> Tensor | None:
        """Where the elements at row-major checkpoint positions ``at`` (int64, any shape and device) are in ``memory``.

        None where elements have no places of their own (nibbles, two functions). Costs a few times ``at``, not the tensor.
        """
        return None

    def offsets(self, box: Box | None = None) -> Tensor:
        """int64, the box's shape: the position of every element in ``memory``. Slow: for oracles.

        Raises LayoutError where elements have no positions of their own, see :meth:`positions`.
        """
        found = self.positions(positions_in(self.shape, box or self.whole))
        if found is None:
            raise LayoutError("elements have no positions of their own", expected="a line of whole elements, or a table")
        return found

    def positional_sums(self, memory: Tensor, box: Box) -> Tensor | None:
        """int64 ``[2]`` on the memory's device: the sum of the bytes of ``box``, and that of each times its position among the
        box's row-major bytes, congruent mod 65521. None where they must be gathered for it.
        """
        return None

    def encode(self, values: Tensor) -> Tensor:
        """``values`` (of ``shape``) as a tensor of their own in kernel order, of ``kernel_shape``; padding is zero."""
        memory = torch.zeros(self.capacity, dtype=self.dtype, device=values.device)
        self.write(memory, self.whole, values)
        return memory.view(self.kernel_shape)

    def decode(self, kernel: Tensor) -> Tensor:
        """The inverse: fresh values of ``shape`` from a contiguous tensor in kernel order."""
        return self.read(kernel.reshape(-1), self.whole)

    def reorder(self, memory: Tensor, new: BoundLayout, max_bytes: int) -> None:
        """Move every element of ``memory`` (flat) from its place in this order to that in ``new``; padding becomes zero.

        What moves is read before it is written: scratch is a region, or everything where the number of regions differs. See
        :class:`StridedLayout` for less.
        """
        regions = [self.whole] if self.lead != new.lead else list(self.by_region())
        for box in reversed(regions) if new.region_capacity > self.region_capacity else regions:
            new.write(memory, box, self.read(memory, box))
        new.clear_padding(memory)

    def clear_padding(self, memory: Tensor) -> None:
        """Zero what no element of the tensor reaches. Scratch: a region."""
        memory[self.capacity :].view(torch.uint8).zero_()
        if self.region_capacity != self.region_elements:
            for (region, _), box in zip(self.touched(memory, self.whole), self.by_region(), strict=True):
                values = self.read(memory, box)
                region.view(torch.uint8).zero_()
                self.write(memory, box, values)

    def by_region(self) -> Iterator[Box]:
        """The box of each region."""
        for index in itertools.product(*map(range, self.shape[: self.lead])):
            yield *((i, i + 1) for i in index), *self.whole[self.lead :]

    def touched(self, memory: Tensor, box: Box) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
        """The memory of every region under ``box``, flat, and its index in the box: ``value[index]`` are its values."""
        by_region = memory[: self.capacity].view(*self.shape[: self.lead], self.region_capacity)
        for index in itertools.product(*(range(stop - start) for start, stop in box[: self.lead])):
            yield by_region[tuple(start + i for (start, _), i in zip(box, index, strict=False))], index

    def empty(self, memory: Tensor, box: Box) -> Tensor:
        return torch.empty(sizes(box), dtype=self.dtype, device=memory.device)

    def check(self, memory: Tensor, box: Box, value: Tensor) -> None:
        """Raises LayoutError unless the box lies in the tensor, the value fits it and the memory is large enough."""
        self.check_value(box, value.shape, value.dtype)
        if memory.dtype is not self.dtype or memory.numel() < self.capacity:
            found = f"{memory.numel()} of {memory.dtype}"
            raise self.unfit(f"memory of {self.capacity} elements of {self.dtype}", found)

    def check_value(self, box: Box, shape: Sequence[int], dtype: torch.dtype) -> Box:
        """The same of the box and a value of ``shape`` and ``dtype``; returns :meth:`checked`."""
        box = self.checked(box)
        if tuple(shape) != sizes(box) or dtype is not self.dtype:
            raise self.unfit(f"{self.dtype} values of box {box}", f"{dtype} {list(shape)}")
        return box

    def checked(self, box: Box) -> Box:
        """The same of the box alone, of whatever kind it is; returns it in whole numbers."""
        found = box_in(box, self.shape)
        if found is None:
            raise self.unfit(f"start and stop in each dim of {list(self.shape)}", box)
        return found

    def unfit(self, expected: object, found: object) -> LayoutError:
        return LayoutError(f"this does not fit a layout of {list(self.shape)}", expected=expected, found=found)


class RegionLayout(BoundLayout):
    """Executed region by region."""

    @abstractmethod
    def put(self, region: Tensor, core: Box, value: Tensor) -> None:
        """Write ``value`` into the memory of one region; ``core``: the box of its dims."""

    @abstractmethod
    def get(self, region: Tensor, core: Box) -> Tensor:
        """The values of ``core`` from the memory of one region, flat or in its shape."""

    def write(self, memory: Tensor, box: Box, value: Tensor) -> None:
        self.check(memory, box, value)
        with torch.no_grad():
            value = in_bytes(value)
            for region, index in self.touched(memory, box):
                self.put(region, box[self.lead :], value[index])

    def read(self, memory: Tensor, box: Box, out: Tensor | None = None) -> Tensor:
        out = self.empty(memory, box) if out is None else out
        self.check(memory, box, out)
        with torch.no_grad():
            for region, index in self.touched(memory, box):
                plain = out[index]
                plain.copy_(self.get(region, box[self.lead :]).reshape(plain.shape))
        return out


def flat_bytes(value: Tensor) -> Tensor:
    """uint8 [n]: the bytes of its elements, row-major; the same memory where they lie so. (To torch one element is contiguous at
    any stride, but has no such view then.)"""
    value = in_bytes(value).contiguous()
    return value.as_strided((value.numel(),), (1,)).view(torch.uint8)


def in_bytes(value: Tensor) -> Tensor:
    """``value`` without a gradient, and with what conj and neg bits say: such bits live on the tensor, not in its bytes."""
    if value.requires_grad or value.is_conj() or value.is_neg():
        return value.detach().resolve_conj().resolve_neg()
    return value
