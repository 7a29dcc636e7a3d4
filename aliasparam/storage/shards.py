"""Writing a shard: a box of one region or several, over and over.

[Note: shards] A loader writes the same few shards of every expert. All regions are alike, so what follows from where a view lies,
counted from its first region, and from the form of a value, is found once for all of them: the box, and strided copies with their
places in memory. A write is then two views and one ``copy_`` for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..layout import BoundLayout, triton_copy
from ..layout.execute import WIDEST, Copy, of_value, wide
from ..layout.strided import TORCH, TRITON, StridedLayout
from ..torch_private import has_no_bytes
from .coverage import Box
from .place import placed
from .states import regions_under

#: Where a view lies, counted from its first region (offset, shape, strides); shape and strides of a value; bytes that addresses
#: are a multiple of; whether our own kernel may run.
Form: TypeAlias = tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], int, bool]


class Move(NamedTuple):
    """One copy of a shard, wherever it begins.

    Attributes:
        copy: which elements of a value, and where in memory; where our own kernel copies, the first of them alone.
        step: elements of its dtype from one region to the next.
        by_kernel: all of them for our own kernel, or None.
        as_it_is: whether the elements are the value itself.
    """

    copy: Copy
    step: int
    by_kernel: Copy | None
    as_it_is: bool


class Shard(NamedTuple):
    """A box, and the copies that bring a value of one form into it. See [Note: shards].

    Attributes:
        box: where it is, if its first region is the first of all. In the coordinates of the tensor: another layout may count a
            dim of one as a region.
        regions: the numbers of its regions, counted from its first.
        moves: the copies.
    """

    box: Box
    regions: Sequence[int]
    moves: Sequence[Move]


class Shards:
    """One memory, for writing shards.

    Args:
        bound: the layout.
        memory: flat, of the layout's dtype.
    """

    def __init__(self, bound: BoundLayout, memory: Tensor) -> None:
        self.bound, self.memory = bound, memory
        self._dtype, self._device, self._width, self._nbytes = memory.dtype, memory.device, memory.itemsize, memory.nbytes
        self._wide = {memory.dtype: memory}  # the same memory in elements of other widths, those that were needed

    def under(self, view: Tensor, value: Tensor) -> tuple[Shard | None, int]:
        """The shard that ``view``, of the checkpoint tensor, is for values like ``value``; and its first region.

        None where ``value`` is of another dtype or device, has no bytes or lies in the memory itself, where the view is no
        box, and where values do not get there by strided copies.
        """
        bound, memory, address, pointer = self.bound, self.memory, self.memory.data_ptr(), value.data_ptr()
        is_like = value.dtype is view.dtype is self._dtype and value.device == self._device
        if not is_like or address <= pointer < address + self._nbytes or not isinstance(bound, StridedLayout):
            return None, 0
        if value.is_conj() or value.is_neg() or has_no_bytes(value) or view.is_conj() or view.is_neg():
            return None, 0
        region, offset = divmod(int(view.storage_offset()), bound.region_elements or 1)
        align = address | pointer | (int(value.storage_offset()) | bound.region_capacity) * self._width | WIDEST
        by_kernel = memory.is_cuda and triton_copy.takes(memory, value)
        form = offset, view.shape, view.stride(), value.shape, value.stride(), align & -align, by_kernel
        shard = planned(bound, form)
        return None if shard is None or region + shard.regions[-1] >= bound.regions else shard, region

    def write(self, shard: Shard, region: int, value: Tensor) -> None:
        """Put ``value`` in its place, from one region on."""
        for copy, step, by_kernel, as_it_is in shard.moves:
            memory = self._wide.get(copy.dtype)
            if memory is None:
                memory = self._wide[copy.dtype] = wide(self.memory, copy.dtype)
            target = memory.as_strided(copy.sizes, copy.kernel, copy.kernel_offset + region * step)
            source = value if as_it_is else of_value(copy, value)
            if by_kernel is None:
                target.copy_(source)
            else:
                triton_copy.run(by_kernel, target, source, write=True)


@lru_cache(maxsize=1 << 13)
def planned(bound: StridedLayout, form: Form) -> Shard | None:
    """What a view is for values of one form, in every memory of this layout; or None: see :meth:`Shards.under`."""
    offset, shape, strides, given, given_strides, align, by_kernel = form
    if not all(shape):
        return None
    lead, place = bound.lead, placed(bound.shape[bound.lead :], offset, shape, strides)
    if place is None:
        lead, place = 0, placed(bound.shape, offset, shape, strides)
    if place is None:
        return None
    value = torch.empty_strided(given, given_strides, dtype=bound.dtype, device="meta")
    boxed = place.to_box(value.expand(shape))
    ones, none = [1] * lead, [0] * lead  # of one region
    box = *((0, 1) for _ in ones), *place.box
    to = box[bound.lead :], (*ones, *place.shape), (*none, *boxed.stride())
    copies = bound.copies(*to, bound.dtype, align, TRITON if by_kernel else TORCH)
    regions = regions_under(box, bound.shape[: bound.lead])
    return Shard(box, regions, [_move(copy, value, bound, ours=ours) for copy, ours in copies])


def _move(copy: Copy, value: Tensor, bound: BoundLayout, *, ours: bool) -> Move:
    step = bound.region_capacity * bound.dtype.itemsize // copy.dtype.itemsize
    if ours:
        return Move(copy.start, step, copy, False)
    own = value.dtype, tuple(value.shape), value.stride(), 0
    if (copy.sizes, copy.kernel, copy.value) == ((value.numel(),), (1,), (1,)) and value.is_contiguous():  # all in one run
        copy = copy._replace(dtype=value.dtype, sizes=own[1], kernel=own[2], value=own[2])
    return Move(copy, step, None, (copy.dtype, copy.sizes, copy.value, copy.value_offset) == own)
