"""Strided copies between values of any strides and kernel memory: planned once, then two views and one ``copy_`` each.

[Note: wide elements] Elements that stay together in both orders are moved as one integer of up to 16 bytes, as far as sizes,
strides and addresses allow. Float8 moves as integers of its own width. One run is as fast in elements of its own width for torch,
and a view of another width takes three calls where one of the same takes one: most of what a small shard costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..torch_private import outside_modes
from .boxes import Piece
from .digits import Axis as Axis
from .digits import joined as joined

#: Bytes of the widest element.
WIDEST = 16
#: By bytes: what moves bits as they are.
WIDE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


class Copy(NamedTuple):
    """One strided copy, in elements of ``dtype``. The value's offset is relative to its first element.

    Kernel strides are negative where a digit is counted backwards and the copy is for a kernel of our own.
    """

    dtype: torch.dtype
    sizes: tuple[int, ...]
    kernel: tuple[int, ...]
    kernel_offset: int
    value: tuple[int, ...]
    value_offset: int

    @property
    def form(self) -> tuple[object, ...]:
        """All but where it starts."""
        return self.dtype, self.sizes, self.kernel, self.value

    @property
    def start(self) -> Copy:
        """Its first element alone."""
        return self._replace(sizes=(), kernel=(), value=())


def alignment(places: int) -> int:
    """Bytes, at most those of the widest element, that all of ``places`` (addresses, one ``|`` the other) are a multiple of."""
    return (places | WIDEST) & -(places | WIDEST)


def plan(pieces: Iterable[Piece], itemsize: int, align: int, widest: int = WIDEST, backward: int | None = None) -> list[Copy]:
    """The copies of ``pieces``, in elements of at most ``widest`` bytes.

    ``align``: the bytes that both addresses are a multiple of (a power of two). ``backward``: from how many bytes on a copy may
    run backwards in kernel memory; None: never.
    """
    copies = []
    for piece in pieces:
        backwards = backward is not None and math.prod(a.size for a in piece.axes) * itemsize >= backward
        for kernel_offset, value_offset, axes in [piece] if backwards else _one_by_one(piece):
            merged = joined(sorted(axes, key=lambda a: -abs(a.kernel)))  # in the order of kernel memory
            copies.append(_copy(merged, kernel_offset, value_offset, itemsize, min(align, widest)))
    return copies


def _one_by_one(piece: Piece) -> Iterator[Piece]:
    """An axis that runs backwards in memory is copied value by value: torch has no negative strides."""
    back = next((axis for axis in piece.axes if axis.kernel < 0), None)
    if back is None:
        yield piece
        return
    rest = [axis for axis in piece.axes if axis is not back]
    for i in range(back.size):
        yield from _one_by_one(Piece(piece.kernel + i * back.kernel, piece.value + i * back.value, rest))


def _copy(axes: list[Axis], kernel_offset: int, value_offset: int, itemsize: int, most: int) -> Copy:
    """In the widest elements, of at most ``most`` bytes. See [Note: wide elements]."""
    outer, run = (axes[:-1], axes[-1].size) if axes and axes[-1].kernel == axes[-1].value == 1 else (axes, 1)
    many = math.gcd(max(most // itemsize, 1), run, kernel_offset, value_offset, *(n for a in outer for n in (a.kernel, a.value)))
    wide = [Axis(a.size, a.kernel // many, a.value // many) for a in outer] + [Axis(run // many, 1, 1)] * (run > many)
    sizes, kernel, value = zip(*wide, strict=True) if wide else ((), (), ())
    return Copy(WIDE[many * itemsize], sizes, kernel, kernel_offset // many, value, value_offset // many)


def for_torch(copy: Copy, dtype: torch.dtype) -> Copy:
    """``copy``, of values of ``dtype``, as torch does it best. See [Note: wide elements]."""
    if copy.kernel == copy.value in ((), (1,)):
        many = copy.dtype.itemsize // dtype.itemsize
        sizes, kernel_offset, value_offset = (math.prod(copy.sizes) * many,), copy.kernel_offset * many, copy.value_offset * many
        return Copy(dtype, sizes, (1,), kernel_offset, (1,), value_offset)
    # Elements of their own width are of their own dtype: engines that mask ``Tensor.copy_`` look for NaN in them.
    return copy._replace(dtype=dtype) if copy.dtype.itemsize == dtype.itemsize > 1 else copy


def views(copy: Copy, memory: Tensor, first: int, value: Tensor) -> tuple[Tensor, Tensor]:
    """The elements of ``copy`` in kernel memory, whose region starts at element ``first`` of its storage, and in ``value``."""
    offset = copy.kernel_offset + first * memory.itemsize // copy.dtype.itemsize
    return _view(memory, copy.dtype, offset, copy.sizes, copy.kernel), of_value(copy, value)


def in_every_region(copy: Copy, memory: Tensor, regions: int, capacity: int) -> Tensor:
    """The elements of ``copy`` from each region, of ``capacity`` elements, of kernel memory on: these are the first dim."""
    stride = capacity * memory.itemsize // copy.dtype.itemsize
    return _view(memory, copy.dtype, copy.kernel_offset, (regions, *copy.sizes), (stride, *copy.kernel))


def of_value(copy: Copy, value: Tensor) -> Tensor:
    """The elements of ``copy`` in a value."""
    dtype, sizes, _, _, strides, offset = copy
    if value.dtype is dtype:
        return value.as_strided(sizes, strides, offset + value.storage_offset())
    return _view(value, dtype, offset + int(value.storage_offset()) * value.itemsize // dtype.itemsize, sizes, strides)


def _view(tensor: Tensor, dtype: torch.dtype, offset: int, sizes: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    if tensor.dtype is dtype:
        return tensor.as_strided(sizes, strides, offset)
    # Whatever the strides are: ``view(dtype)`` wants whole rows.
    return _empty(dtype, tensor.device).new_empty(0).set_(tensor.untyped_storage(), offset, sizes, strides)


@lru_cache
def _empty(dtype: torch.dtype, device: torch.device) -> Tensor:
    with outside_modes():  # it is kept
        return torch.empty(0, dtype=dtype, device=device)
