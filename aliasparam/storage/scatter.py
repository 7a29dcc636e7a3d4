"""Values from another device or of another dtype on their way into kernel order: in pieces, through memory of bounded size."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import BoundLayout
from ..layout.blocks import tiles
from ..torch_private import has_no_bytes
from .coverage import Box

#: Bytes of that memory, on the device of the storage.
STAGING_BYTES = 16 << 20
#: Pageable host memory goes to a GPU through pinned pieces of this many bytes; less is as fast without.
_PINNED_BYTES = 4 << 20


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
        inside = tuple(slice(a - r, b - r) for (a, b), (r, _) in zip(piece, box, strict=True))
        source = value[inside]
        landing = staging[: source.numel()].view(source.shape)
        if pinned:  # torch keeps such memory until the copy has run; the next piece is brought meanwhile
            source = torch.empty(source.shape, dtype=memory.dtype, pin_memory=True).copy_(source)
        landing.copy_(source, non_blocking=pinned or non_blocking)
        bound.write(memory, piece, landing)
