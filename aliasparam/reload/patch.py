"""Some bytes of one live tensor, old and perhaps new, kept on the host: what a journal holds, and what a delta becomes.

A patch is put by writing bytes, never by changing what is there, so it may be put again after a failure half-way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ReloadError
from ..layout.bound import BoundLayout
from ..layout.boxes import row_major
from ..storage.coverage import Box
from .live import Live

#: Bytes of a tensor that are compared at once.
PIECE = 2 << 20


class Patch(NamedTuple):
    """
    Attributes:
        live: the tensor.
        box: what was compared; all of it where ``at`` is None.
        at: int32 or int64 [n], byte positions in memory less ``base``.
        old, new: uint8 [n], on the host; pinned where the tensor is on a CUDA device.
        bound: the layout that ``at`` is of.
    """

    live: Live
    box: Box
    at: Tensor | None
    base: int
    old: Tensor
    new: Tensor | None
    bound: BoundLayout | None

    @property
    def nbytes(self) -> int:
        """Host memory."""
        return sum(part.nbytes for part in (self.at, self.old, self.new) if part is not None)

    def put_old(self) -> None:
        self._put(self.old)

    def put_new(self) -> None:
        if self.new is None:
            raise AssertionError("a patch without new bytes")
        self._put(self.new)

    def _put(self, values: Tensor) -> None:
        device, storage = self.live.device, self.live.storage
        if storage is not None and storage.bound is not self.bound:
            raise ReloadError("the layout was changed while a reload was open", label=storage.label)
        with torch.no_grad():
            values = values.to(device, non_blocking=True)
            if self.at is None:
                sizes = [stop - start for start, stop in self.box]
                self.live.part(self.box).copy_(values.view(self.live.dtype).view(sizes))
                return
            at = self.at.to(device, non_blocking=True).to(torch.int64) + self.base
            with self.live.writing() as memory:
                memory[at] = values


def patch_of(live: Live, box: Box, old: Tensor, new: Tensor, *, keep_new: bool) -> Patch | None:
    """Where ``old`` and ``new`` (uint8 [n], the bytes of ``box``, on the tensor's device) differ; None where they do not.

    Keeps positions and bytes (5 bytes of host memory a changed byte, 6 with the new ones), or all bytes if that is less.
    """
    where = (old != new).nonzero().view(-1)
    if not where.numel():
        return None
    bound = None if live.storage is None else live.storage.bound
    places = None
    if where.numel() * (5 + keep_new) < old.numel() * (1 + keep_new):
        places = live.positions(_in_tensor(live, box, where))
    if places is None:
        return Patch(live, box, None, 0, on_host(old), on_host(new) if keep_new else None, bound)
    base = int(places.min())
    near = int(places.max()) - base < 1 << 31
    at = on_host((places - base).to(torch.int32 if near else torch.int64))
    return Patch(live, box, at, base, on_host(old[where]), on_host(new[where]) if keep_new else None, bound)


def _in_tensor(live: Live, box: Box, at: Tensor) -> Tensor:
    """Byte positions in the row-major ``box`` as byte positions in the whole tensor."""
    size = live.dtype.itemsize
    element, found = at // size, torch.zeros_like(at)
    for (start, stop), stride in zip(reversed(box), reversed(row_major(live.shape)), strict=True):
        found += (element % (stop - start) + start) * stride
        element = element // (stop - start)
    return found * size + at % size


def on_host(values: Tensor) -> Tensor:
    """A copy in host memory, pinned where the values come from a CUDA device."""
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda).copy_(values)
