"""Writing a shard: a box inside one region, over and over.

[Note: shards] A loader writes the same few shards of every expert. A view inside one region is a view of that region's part of
the tensor, so what follows from it, and from the form of a value, is found once for all regions: the box, and strided copies
with their places in memory. A write is then two views and one ``copy_`` for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..layout import BoundLayout, triton_copy
from ..layout.execute import WIDEST, Copy, in_every_region, of_value
from ..layout.strided import StridedLayout
from ..torch_private import outside_inference
from .coverage import Box
from .place import placed

#: Shards kept for one memory, each with a view of it for every copy.
_KEPT = 64

#: Where a view lies in its region (offset, shape, strides); shape and strides of a value; bytes that addresses are a multiple of;
#: whether our own kernel may run.
Form: TypeAlias = tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], int, bool]


class Step(NamedTuple):
    """One copy of a shard.

    Attributes:
        memory: where its elements are in kernel memory; where there are regions, in each of them, and these are the first dim.
        elements: which ones of a value it takes; None for all, as they are.
        by_kernel: the copy which our own kernel makes, or None. Of such a copy both others are the first element.
    """

    memory: Tensor
    elements: Copy | None
    by_kernel: Copy | None


class Shard:
    """A box inside one region, and the copies that bring a value of one form into it. See [Note: shards].

    Attributes:
        box: in the coordinates of the region.
    """

    def __init__(self, box: Box, copies: Sequence[tuple[Copy, bool]], memory: Tensor, bound: BoundLayout, form: Form) -> None:
        self.box = box
        self._has_regions = bound.lead > 0
        self._steps = []
        as_it_is = form[3], form[4], 0, memory.dtype
        for copy, by_kernel in copies:
            taken = copy.start if by_kernel else copy
            everywhere = in_every_region(taken, memory, bound.regions, bound.region_capacity)
            elements = None if (taken.sizes, taken.value, taken.value_offset, taken.dtype) == as_it_is else taken
            self._steps.append(Step(everywhere if bound.lead else everywhere[0], elements, copy if by_kernel else None))

    def write(self, region: int, value: Tensor) -> None:
        """Put ``value`` in its place in one region."""
        for memory, elements, by_kernel in self._steps:
            target = memory[region] if self._has_regions else memory
            source = value if elements is None else of_value(elements, value)
            if by_kernel is None:
                target.copy_(source)
            else:
                triton_copy.run(by_kernel, target, source, write=True)


class Shards:
    """The shards of one memory that were written last.

    Args:
        bound: the layout.
        memory: flat, of the layout's dtype.
    """

    def __init__(self, bound: BoundLayout, memory: Tensor) -> None:
        self.bound, self.memory = bound, memory
        self._dtype, self._device, self._width, self._nbytes = memory.dtype, memory.device, memory.itemsize, memory.nbytes
        self._found: dict[Form, Shard] = {}

    def under(self, view: Tensor, value: Tensor) -> tuple[Shard | None, int]:
        """The shard that ``view``, of the checkpoint tensor, is for values like ``value``; and its region.

        None where ``value`` is of another dtype or device or lies in the memory itself, where the view is no box of one region,
        and where values do not get there by strided copies.
        """
        bound, memory, address, pointer = self.bound, self.memory, self.memory.data_ptr(), value.data_ptr()
        is_like = value.dtype is view.dtype is self._dtype and value.device == self._device
        if not is_like or address <= pointer < address + self._nbytes:
            return None, 0
        if value.is_conj() or value.is_neg() or view.is_conj() or view.is_neg():  # such bits are not in the bytes
            return None, 0
        region, offset = divmod(int(view.storage_offset()), bound.region_elements or 1)
        align = address | pointer | (int(value.storage_offset()) | bound.region_capacity) * self._width | WIDEST
        by_kernel = memory.is_cuda and triton_copy.takes(memory, value)
        form = offset, view.shape, view.stride(), value.shape, value.stride(), align & -align, by_kernel
        shard = self._found.get(form) or self._planned(form)
        return shard if region < bound.regions else None, region

    def _planned(self, form: Form) -> Shard | None:
        found = planned(self.bound, form) if isinstance(self.bound, StridedLayout) else None
        if found is None:
            return None
        if len(self._found) == _KEPT:
            self._found.clear()
        with outside_inference():
            self._found[form] = Shard(*found, self.memory, self.bound, form)
        return self._found[form]


@lru_cache(maxsize=1 << 14)
def planned(bound: StridedLayout, form: Form) -> tuple[Box, list[tuple[Copy, bool]]] | None:
    """The box of a region which a view is, and the copies that bring a value there; or None: see :meth:`Shards.under`."""
    offset, shape, strides, given, given_strides, align, by_kernel = form
    if not all(shape):
        return None
    place = placed(bound.shape[bound.lead :], offset, shape, strides)
    if place is None:
        return None
    value = torch.empty_strided(given, given_strides, device="meta")
    boxed = place.to_box(value.expand(shape))
    ones, none = [1] * bound.lead, [0] * bound.lead  # of one region
    copies = bound.copies(place.box, (*ones, *place.shape), (*none, *boxed.stride()), bound.dtype, align, by_kernel=by_kernel)
    (copy, ours), *more = copies
    if not (more or ours) and (copy.sizes, copy.kernel, copy.value) == ((value.numel(),), (1,), (1,)) and value.is_contiguous():
        copies = [(copy._replace(dtype=bound.dtype, sizes=given, kernel=given_strides, value=given_strides), False)]  # one run
    return place.box, copies
