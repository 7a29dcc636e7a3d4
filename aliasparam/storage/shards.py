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
from ..layout.execute import Copy, alignment, in_every_region, of_value
from ..layout.strided import TORCH, TRITON, StridedLayout
from ..torch_private import has_no_bytes, outside_inference
from .coverage import Box
from .place import placed
from .states import regions_under

#: Shards kept for one memory, each with a view of it for every copy.
_KEPT = 16

#: Where a view lies, counted from its first region (offset, shape, strides); shape and strides of a value; bytes that addresses
#: are a multiple of; whether our own kernel may run.
Form: TypeAlias = tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], int, bool]


class Move(NamedTuple):
    """One copy of a shard, wherever it begins.

    Attributes:
        copy: which elements of a value, and where in memory; where our own kernel copies, the first of them alone.
        by_kernel: all of them for our own kernel, or None.
        as_it_is: whether the elements are the value itself.
    """

    copy: Copy
    by_kernel: Copy | None
    as_it_is: bool


class Shard:
    """A box, and the copies that bring a value of one form into it. See [Note: shards].

    Attributes:
        box: where it is, if its first region is the first of all. In the coordinates of the tensor: another layout may count a
            dim of one as a region.
        regions: the numbers of its regions, counted from its first.
    """

    def __init__(self, box: Box, moves: Sequence[Move], memory: Tensor, bound: BoundLayout) -> None:
        self.box = box
        self.regions = regions_under(box, bound.shape[: bound.lead])
        firsts = bound.regions - self.regions[-1]
        everywhere = [in_every_region(move.copy, memory, firsts, bound.region_capacity) for move in moves]
        self._has_regions = bound.lead > 0
        self._moves = [(move, t if bound.lead else t[0]) for move, t in zip(moves, everywhere, strict=True)]

    def write(self, region: int, value: Tensor) -> None:
        """Put ``value`` in its place, from one region on."""
        for (copy, by_kernel, as_it_is), memory in self._moves:
            target = memory[region] if self._has_regions else memory
            source = value if as_it_is else of_value(copy, value)
            if by_kernel is None:
                target.copy_(source)
            else:
                triton_copy.run(by_kernel, target, source, write=True)


def shard_under(
    bound: BoundLayout, memory: Tensor, kept: dict[Form, Shard], view: Tensor, value: Tensor
) -> tuple[Shard | None, int]:
    """The shard that ``view``, of the checkpoint tensor in ``memory``, is for values like ``value``; and its first region.

    None where ``value`` is of another dtype or device, has no bytes or lies in the memory itself, where the view is no
    box, and where values do not get there by strided copies.

    Args:
        memory: flat, of the dtype of the layout ``bound``.
        kept: the shards of this memory that were written last.
    """
    address, pointer, dtype = memory.data_ptr(), value.data_ptr(), bound.dtype
    is_like = value.dtype is view.dtype is dtype and value.device == memory.device
    if not is_like or address <= pointer < address + memory.nbytes:
        return None, 0
    if has_no_bytes(value) or value.is_neg() or view.is_neg() or (dtype.is_complex and (value.is_conj() or view.is_conj())):
        return None, 0
    region, offset = divmod(int(view.storage_offset()), bound.region_elements or 1)
    align = alignment(address | pointer | (int(value.storage_offset()) | bound.region_capacity) * dtype.itemsize)
    by_kernel = memory.is_cuda and triton_copy.takes(memory, value)
    form = offset, view.shape, view.stride(), value.shape, value.stride(), align, by_kernel
    shard = kept.get(form) or _found(bound, memory, kept, form)
    return None if shard is None or region + shard.regions[-1] >= bound.regions else shard, region


def _found(bound: BoundLayout, memory: Tensor, kept: dict[Form, Shard], form: Form) -> Shard | None:
    found = planned(bound, form) if isinstance(bound, StridedLayout) else None
    if found is None:
        return None
    with outside_inference():
        shard = Shard(*found, memory, bound)
    if len(kept) == _KEPT:
        kept.clear()
    kept[form] = shard
    return shard


@lru_cache(maxsize=1 << 13)
def planned(bound: StridedLayout, form: Form) -> tuple[Box, list[Move]] | None:
    """The :attr:`Shard.box` that a view is, and the copies that bring a value there; or None: see :func:`shard_under`."""
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
    return box, [Move(copy.start, copy, False) if ours else _by_torch(copy, value) for copy, ours in copies]


def _by_torch(copy: Copy, value: Tensor) -> Move:
    if (copy.sizes, copy.kernel, copy.value) == ((value.numel(),), (1,), (1,)) and value.is_contiguous():  # all in one run
        copy = copy._replace(dtype=value.dtype, sizes=tuple(value.shape), kernel=value.stride(), value=value.stride())
    own = value.dtype, tuple(value.shape), value.stride(), 0
    return Move(copy, None, (copy.dtype, copy.sizes, copy.value, copy.value_offset) == own)
