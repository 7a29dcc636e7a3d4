"""One write transaction over any number of storages: tell, mark, scatter, count.

1. whoever shows a kernel name of these storages, or derives from them, is told and refuses;
2. the regions under all parts are INVALID;
3. values are scattered into kernel order, those from another device or dtype in pieces;
4. what has arrived is counted, and the regions are what they were or better.

An error before 2 has changed nothing. An interrupt after it leaves regions that refuse until they are written whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..host import HOST
from ..layout import BoundLayout
from ..layout.boxes import part_in, tiles
from ..torch_private import has_no_bytes
from .coverage import Box
from .guarded import GuardedMemory

#: Bytes of the memory through which values from another device or dtype pass, on the device of the storage.
STAGING_BYTES = 16 << 20
#: Pageable host memory goes to a GPU through pinned pieces of this many bytes; less is as fast without.
_PINNED_BYTES = 4 << 20


class Part(NamedTuple):
    """Values for one box.

    Attributes:
        storage: where they go.
        box: in checkpoint coordinates.
        value: of the box's shape, on any device and of any dtype that ``copy_`` takes.
        arrived: the boxes that count as written where that is not ``box``: values beside them are what was there.
    """

    storage: GuardedMemory
    box: Box
    value: Tensor
    arrived: Sequence[Box] | None = None


def write_all(parts: Sequence[Part], non_blocking: bool = False) -> None:
    """Write all parts, or none, or leave what was begun refusing. The caller holds the locks of all, and takes no gradient.

    Args:
        parts: where two of one storage overlap, the last is right.
        non_blocking: as of ``Tensor.copy_``.

    Raises:
        StateError: a storage is exposed to an outside writer. Nothing has changed then.
        RuntimeError: torch's own, for a value that it cannot copy. Nothing has changed then.
    """
    for part in parts:
        part.storage.need_writable()
    parts = [part._replace(value=landable(part.value, part.storage.elements)) for part in parts]
    for part in parts:
        part.storage.changing()
        part.storage.clear_unknown(part.storage.states.under(part.box))
    begun = [(part.storage, part.storage.states.begin(part.box)) for part in parts]
    for part in parts:
        scatter(part.storage.bound, part.storage.elements, part.box, part.value, non_blocking)
    for storage, before in reversed(begun):  # the first of two parts of one storage knows what it was before both
        storage.states.rollback(before)
    for part in parts:
        states = part.storage.states
        for box in [part.box] if part.arrived is None else part.arrived:
            states.arrived(box, states.begin(box))


def is_brought_whole(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``value`` lies on the host, is of ``dtype``, and goes to a GPU in one piece."""
    return value.device.type == "cpu" and value.dtype is dtype and value.nbytes < _PINNED_BYTES


def landable(value: Tensor, memory: Tensor) -> Tensor:
    """``value`` as it can be scattered into ``memory``. What torch cannot copy there (without data, a dtype without a conversion,
    bits that cannot be resolved, another library's tensor) raises torch's own error here, before anything is written."""
    is_like = type(value) is Tensor and value.dtype is memory.dtype and not value.is_meta
    if is_like and value.layout is torch.strided and not (value.is_conj() or value.is_neg() or has_no_bytes(value)):
        return value
    is_torchs = value.layout is torch.strided and type(value).__torch_dispatch__ is Tensor.__torch_dispatch__
    if not is_torchs or value.is_meta or has_no_bytes(value):
        return torch.empty(value.shape, dtype=memory.dtype, device=memory.device).copy_(value)
    one = value[(slice(1),) * value.dim()]  # tells of all elements; where it is, so that no device waits for another
    torch.empty(one.shape, dtype=memory.dtype, device=one.device).copy_(one)
    return value


def scatter(bound: BoundLayout, memory: Tensor, box: Box, value: Tensor, non_blocking: bool = False) -> None:
    """Put ``value``, of the box's shape, in its place in ``memory``. ``non_blocking`` as of ``Tensor.copy_``."""
    if value.dtype is memory.dtype and value.device == memory.device:
        bound.write(memory, box, value)
        return
    value = value.detach()
    pinned = value.device.type == "cpu" and memory.is_cuda and value.nbytes >= _PINNED_BYTES and not value.is_pinned()
    most = (_PINNED_BYTES if pinned else STAGING_BYTES) // memory.element_size()
    if value.numel() <= most:
        bound.write(memory, box, value.to(memory.device, memory.dtype, non_blocking=non_blocking))
        return
    staging = torch.empty(most, dtype=memory.dtype, device=memory.device)
    for piece in tiles(box, most):
        source = value[part_in(piece, box)]
        landing = staging[: source.numel()].view(source.shape)
        if pinned:  # the next piece is brought meanwhile
            source = pinned_copy(source, memory.dtype)
        landing.copy_(source, non_blocking=pinned or non_blocking)
        bound.write(memory, piece, landing)


def pinned_copy(values: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in pinned memory, which torch keeps for the next one and until copies from it have run."""
    return torch.empty(values.shape, dtype=dtype, device=HOST, pin_memory=True).copy_(values)
