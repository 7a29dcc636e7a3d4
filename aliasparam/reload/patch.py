"""Some bytes of one live tensor, old and perhaps new, kept on the host: what a journal holds, and what a delta becomes.

A patch is put by writing bytes, never by changing what is there, so it may be put again after a failure half-way. Positions are
of the layout that the tensor had: who holds patches sees by versions that nobody else changed it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout.bound import flat_bytes
from ..layout.boxes import Box, part_in, row_major, sizes, tiles
from ..storage.transaction import pinned_copy
from ..torch_private import writing
from .live import Live

#: Bytes of a tensor that are compared at once.
PIECE = 2 << 20
#: Positions that are written at once: 16 bytes of device scratch for each.
JOINED = 1 << 20


class Patch(NamedTuple):
    """
    Attributes:
        live: the tensor.
        box: what was compared; all of it where ``at`` is None.
        at: int32 or int64 [n], byte positions in memory less ``base``.
        old, new: uint8 [n], on the host; of a journal's there is no new one, uint8 [0].
    """

    live: Live
    box: Box
    at: Tensor | None
    base: int
    old: Tensor
    new: Tensor

    @property
    def nbytes(self) -> int:
        """Host memory."""
        return (0 if self.at is None else self.at.nbytes) + self.old.nbytes + self.new.nbytes

    def put(self, values: Tensor) -> None:
        """Write the old or the new bytes."""
        device = self.live.device
        with writing(self.live.tensor):
            values = values.to(device, non_blocking=True)
            if self.at is None:
                self.live.part(self.box).copy_(values.view(self.live.dtype).view(sizes(self.box)))
                return
            at = self.at.to(device, non_blocking=True)
            with self.live.writing() as memory:
                memory[self.base :].index_put_((at,), values)


def differences(live: Live, box: Box, value: Tensor, *, keep_new: bool) -> Iterator[Patch | None]:
    """Where ``value`` differs from what is there under ``box``, piece by piece."""
    for tile in tiles(box, max(PIECE // live.dtype.itemsize, 1)):
        new = on_device(value[part_in(tile, box)].detach(), live.device)
        yield patch_of(live, tile, live.bytes(tile), flat_bytes(new), keep_new=keep_new)


def patch_of(live: Live, box: Box, old: Tensor, new: Tensor, *, keep_new: bool) -> Patch | None:
    """Where ``old`` and ``new`` (uint8 [n], the bytes of ``box``, on the tensor's device) differ; None where they do not.

    Keeps positions and bytes (5 bytes of host memory a changed byte, 6 with the new ones), or all bytes if that is less.
    """
    differs = old != new
    count = int(differs.count_nonzero())
    if not count:
        return None
    kept = new if keep_new else new[:0]
    if count * (5 + keep_new) < old.numel() * (1 + keep_new):
        where = _where(differs)
        places = live.positions(_in_tensor(live, box, where))
        if places is not None:
            return patch_at(live, places, old[where], kept[where] if keep_new else kept)
    return Patch(live, box, None, 0, on_host(old), on_host(kept))


def patch_at(live: Live, places: Tensor, old: Tensor, new: Tensor) -> Patch:
    """Of bytes at ``places`` in memory (int64 [n], n > 0, no two alike), all on the tensor's device."""
    base = int(places.min())
    return Patch(live, live.box, on_host(_narrow(places - base)), base, on_host(old), on_host(new))


def patched(live: Live, patches: Iterable[Patch]) -> Live:
    """What a plain tensor becomes with its patches, in host memory of its own."""
    found = Live(live.tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format))
    for patch in patches:
        patch._replace(live=found).put(patch.new)
    return found


def _where(differs: Tensor) -> Tensor:
    """``nonzero`` of bool [n], of which few are true: on a CPU first of words of eight, as it looks at each for a nanosecond."""
    if differs.is_cuda or differs.numel() % 8:
        return differs.nonzero().view(-1)
    words = differs.view(torch.int64).nonzero().view(-1)
    row, column = differs.view(-1, 8)[words].nonzero().unbind(1)
    return words[row] * 8 + column


def joined(patches: Iterable[Patch | None]) -> list[Patch]:
    """The patches of one tensor, ready to be put: joined up to :data:`JOINED` positions, as a commit pays for each whatever is
    in it; pinned where they go to a CUDA device, which costs a call of its own for each."""
    found: list[Patch] = []
    group: list[Patch] = []
    for patch in patches:
        if patch is None:
            continue
        if patch.at is None:
            found.append(_pinned(patch))
            continue
        if group and sum(one.old.numel() for one in group) + patch.old.numel() > JOINED:
            found.append(_join(group))
            group = []
        group.append(patch)
    return [*found, _join(group)] if group else found


def _join(group: list[Patch]) -> Patch:
    if len(group) == 1:
        return _pinned(group[0])
    base = min(patch.base for patch in group)
    places = torch.cat([patch.at.to(torch.int64) + (patch.base - base) for patch in group if patch.at is not None])
    old, new = (torch.cat(parts) for parts in zip(*((patch.old, patch.new) for patch in group), strict=True))
    return _pinned(group[0]._replace(at=_narrow(places), base=base, old=old, new=new))


def _pinned(patch: Patch) -> Patch:
    if patch.live.device.type != "cuda":
        return patch
    return patch._replace(at=None if patch.at is None else patch.at.pin_memory(), new=patch.new.pin_memory())


def _narrow(places: Tensor) -> Tensor:
    """int64 [n] as int32 where they fit."""
    return places.to(torch.int32) if int(places.max()) < 1 << 31 else places


def _in_tensor(live: Live, box: Box, at: Tensor) -> Tensor:
    """Byte positions in the row-major ``box`` as byte positions in the whole tensor."""
    size = live.dtype.itemsize
    element, found = at // size, torch.zeros_like(at)
    for (start, stop), stride in zip(reversed(box), reversed(row_major(live.shape)), strict=True):
        found += (element % (stop - start) + start) * stride
        element = element // (stop - start)
    return found * size + at % size


def on_host(values: Tensor) -> Tensor:
    """A copy in pageable host memory; from a GPU by way of pinned memory, as small copies past it move a gigabyte a second."""
    return pinned_copy(values, values.dtype).clone() if values.is_cuda else values.to("cpu", copy=True)


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """The values on ``device``; from pageable host memory to a GPU by way of pinned memory too."""
    pageable = values.device.type == "cpu" and device.type == "cuda" and not values.is_pinned()
    return pinned_copy(values, values.dtype).to(device, non_blocking=True) if pageable else values.to(device)
