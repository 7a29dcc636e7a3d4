"""What deltas change in one live tensor, verified: the bytes that differ, old and new.

Where bytes have places of their own and the checksum is adler32, a sum over positions, only the bytes that a delta names are
looked at, after one pass for the digest of the old ones. Otherwise the tensor is read in pieces, changed in scratch, digested and
compared; what is another tensor in the model (see :class:`~aliasparam.reload.delta_held.Converted`) as a whole, on the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .delta import Change
from .delta_folder import DeltaFolder
from .delta_held import Converted, Part, Span, spans
from .delta_parts import PartDigests
from .errors import DeltaError
from .hashers import Digest, digest_of
from .live import Live, flat_bytes
from .live_digest import digest_live
from .patch import PIECE, Patch, joined, patch_at, patch_of
from .session import ReloadSession
from .sources import SafetensorsFolder


def patches_of(
    live: Live, name: str, full: SafetensorsFolder | None, deltas: list[DeltaFolder], parts: PartDigests
) -> list[Patch]:
    """What differs in one tensor, after its new bytes were verified (those of a part by ``parts.check``, later).

    Raises:
        DeltaError: a malformed delta, or a checksum that differs; the tensor does not fit, or changed meanwhile.
    """
    part, version = parts.part_of(name, live), live.version
    touching = [delta for delta in deltas if name in delta.checksums]
    found = None
    if full is not None:
        _need_fit(full, name, live, part)
    elif part is None:
        found = _scattered(live, name, touching)
    if found is None:
        digest = parts.digest(name, part, touching[-1], live.dtype.itemsize) if touching else None
        found = joined(_compared(live, name, full, touching, part, digest))
        if digest is not None and part is None:
            touching[-1].check(name, digest.hexdigest(live.nbytes))
    if live.version != version:
        raise DeltaError("the live tensor changed while the delta was checked against it", name=name)
    return found


def patch_converted(session: ReloadSession, one: Converted, full: SafetensorsFolder | None, deltas: list[DeltaFolder]) -> None:
    """Hold what the deltas change in the model's tensors of one conversion. Memory: these tensors, on the host.

    Raises:
        DeltaError: as for tensors that are what the files have.
    """
    lives = {name: session.live(name) for name in one.targets}
    versions = {name: live.version for name, live in lives.items()}
    if full is not None:
        stored = {name: full.read(name) for name in one.sources}
    else:
        values = {name: live.bytes(live.box).cpu().view(live.dtype).view(live.shape) for name, live in lives.items()}
        stored = dict(one.revert(values))
    made = one.convert({name: changed(name, stored[name], deltas) for name in one.sources})
    for name, live in lives.items():
        if live.version != versions[name]:
            raise DeltaError("the live tensor changed while the delta was checked against it", name=name)
        session.patch(name, lambda live, value=made[name], name=name: _replaced(live, name, value))  # type: ignore[misc]


def changed(name: str, value: Tensor, deltas: list[DeltaFolder]) -> Tensor:
    """A tensor of the files with the deltas applied, on the host.

    Raises:
        DeltaError: a malformed delta, or its bytes are not what the last delta promised.
    """
    touching = [delta for delta in deltas if name in delta.checksums]
    if not touching:
        return value
    raw = flat_bytes(value.detach().cpu()).clone()
    for delta in touching:
        for change in delta.pieces(name, raw.numel()):
            change.apply_(raw)
    touching[-1].check(name, digest_of(raw, touching[-1].checksum_format))
    return raw.view(value.dtype).view(value.shape)


# -- by what changes ---------------------------------------------------------------------------------------------------------


def _scattered(live: Live, name: str, deltas: list[DeltaFolder]) -> list[Patch] | None:
    """None where bytes have no places, or the checksum is no sum over them; or where so many change that pieces are less."""
    memory = live.memory()
    if memory is None or not live.has_places or deltas[-1].checksum_format != "adler32":
        return None
    sums = digest_live(live, "adler32").sums
    if sums is None:
        raise AssertionError("adler32 without sums")
    cursors = [_Cursor(delta, name, live.nbytes) for delta in deltas]
    found: list[Patch] = []
    held = 0
    for at, places, old, new in _changes(live, memory, cursors):
        sums.add(old, at, sign=-1)
        sums.add(new, at)
        found.append(patch_at(live, live.box, places, old, new))
        held += found[-1].nbytes
        if held > 2 * live.nbytes:
            return None
    deltas[-1].check(name, sums.hexdigest(live.nbytes))
    return joined(found)


def _changes(live: Live, memory: Tensor, cursors: list[_Cursor]) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(checkpoint byte positions, places in memory, old bytes, new bytes) where the deltas in their order change the tensor."""
    while stops := [cursor.now.stop for cursor in cursors if cursor.now is not None]:
        changes = [(change, *change.scattered(live.device)) for one in cursors for change in one.take(min(stops))]
        at = changes[0][1] if len(changes) == 1 else torch.unique(torch.cat([positions for _, positions, _ in changes]))
        places = live.positions(at)
        if places is None:
            raise AssertionError("bytes without places")
        old = memory[places]
        new = old.clone()
        for change, positions, values in changes:
            where = torch.searchsorted(at, positions) if positions is not at else slice(None)
            new[where] = change.of(new[where], values)
        differs = (old != new).nonzero().view(-1)  # a delta may overwrite a byte with itself
        if differs.numel():
            yield at[differs], places[differs], old[differs], new[differs]


class _Cursor:
    """The changes of one delta to one tensor, taken in order."""

    def __init__(self, delta: DeltaFolder, name: str, nbytes: int) -> None:
        self._pieces = delta.pieces(name, nbytes)
        self.now = next(self._pieces, None)

    def take(self, stop: int) -> Iterator[Change]:
        """Those before byte ``stop``. Use each before asking for the next."""
        while self.now is not None and self.now.start < stop:
            if self.now.stop > stop:
                before, self.now = self.now.cut(stop)
                yield before
            else:
                yield self.now
                self.now = next(self._pieces, None)

    def finish(self) -> None:
        """Read the rest, which is of parts that are elsewhere, or nothing. Raises DeltaError: it does not end as it should."""
        for _ in self._pieces:
            pass


# -- by pieces ---------------------------------------------------------------------------------------------------------------


def _compared(
    live: Live, name: str, full: SafetensorsFolder | None, deltas: list[DeltaFolder], part: Part | None, digest: Digest | None
) -> Iterator[Patch | None]:
    nbytes = live.nbytes if part is None else math.prod(part.shape) * live.dtype.itemsize
    cursors = [_Cursor(delta, name, nbytes) for delta in deltas]
    for span in spans(live, part):
        old = live.bytes(span.box)
        new = span.put(old) if full is None else _stored(full, name, span, old)
        touched = full is not None
        for cursor in cursors:
            for _ in cursor.take(span.start):
                pass  # of a part that is elsewhere
            for change in cursor.take(span.start + span.nbytes):
                change.apply_(new, span.start)
                touched = True
        own = span.take(new)
        if digest is not None:
            digest.add(new if span.columns is None else span.put(own), span.start)
            if digest.sums is not None:
                digest.sums.count -= span.nbytes - own.numel()  # zeros in the place of what is elsewhere
        if touched:
            yield patch_of(live, span.box, old, own, keep_new=True)
    for cursor in cursors:
        cursor.finish()


def _stored(full: SafetensorsFolder, name: str, span: Span, like: Tensor) -> Tensor:
    raw = torch.empty(span.nbytes, dtype=torch.uint8, pin_memory=like.is_cuda)
    full.raw(name, span.start, raw)
    return raw.to(like.device)


def _need_fit(full: SafetensorsFolder, name: str, live: Live, part: Part | None) -> None:
    entry, shape = full.entry(name), live.shape if part is None else part.shape
    if (entry.dtype, tuple(entry.shape)) != (live.dtype, shape):
        expected, found = f"{live.dtype} {list(shape)}", f"{entry.dtype} {list(entry.shape)}"
        raise DeltaError("the full version does not fit the model", name=f"{full.path}: {name}", expected=expected, found=found)


def _replaced(live: Live, name: str, value: Tensor) -> list[Patch]:
    if (value.dtype, tuple(value.shape)) != (live.dtype, live.shape):
        expected, found = f"{live.dtype} {list(live.shape)}", f"{value.dtype} {list(value.shape)}"
        raise DeltaError("the converted tensor does not fit the model", name=name, expected=expected, found=found)
    raw = flat_bytes(value)
    pieces = ((start, box, live.bytes(box)) for start, box in live.pieces(PIECE))
    return joined(patch_of(live, box, old, raw[at : at + old.numel()].to(old.device), keep_new=True) for at, box, old in pieces)
