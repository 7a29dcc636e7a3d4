"""What deltas change in one live tensor, verified: the bytes that differ, old and new.

A tensor is read in pieces, changed in scratch, digested and compared. Of one whose digest is summed where it lies (adler32 on a
GPU), those pieces alone that a delta names. What is another tensor in the model (see
:class:`~aliasparam.reload.delta_held.Converted`) is converted as a whole, on the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .delta import PIECE as CHANGED_AT_ONCE
from .delta_folder import DeltaFolder
from .delta_held import Converted, Part, Span, spans
from .delta_parts import PartDigests
from .errors import DeltaError
from .hashers import Digest, digest_of
from .live import Live, flat_bytes
from .live_digest import add_in_place
from .patch import PIECE, Patch, joined, patch_of
from .sources import SafetensorsFolder


def patches_of(
    live: Live, name: str, full: SafetensorsFolder | None, deltas: list[DeltaFolder], parts: PartDigests
) -> list[Patch]:
    """What differs in one tensor, after its new bytes were verified (those of a part by ``parts.check``, later).

    Raises:
        DeltaError: a malformed delta, or a checksum that differs; the tensor does not fit.
    """
    part = parts.part_of(name, live)
    touching = [delta for delta in deltas if name in delta.checksums]
    if full is not None:
        _need_fit(full, name, live, part)
    digest = parts.digest(name, part, touching[-1], live.dtype.itemsize) if touching else None
    found = joined(_compared(live, name, full, touching, part, digest))
    if digest is not None and part is None:
        touching[-1].check(name, digest.hexdigest(live.nbytes))
    return found


def patches_of_converted(
    one: Converted, lives: Sequence[Live], full: SafetensorsFolder | None, deltas: list[DeltaFolder]
) -> list[list[Patch]]:
    """What differs in each of ``lives``, the model's tensors of one conversion. Memory: these tensors, on the host.

    Raises:
        DeltaError: as for tensors that are what the files have.
    """
    if full is not None:
        stored = {name: full.read(name) for name in one.sources}
    else:
        values = [live.bytes(live.box).cpu().view(live.dtype).view(live.shape) for live in lives]
        stored = dict(one.revert(dict(zip(one.targets, values, strict=True))))
    made = one.convert({name: changed(name, stored[name], deltas) for name in one.sources})
    return [_replaced(live, name, made[name]) for name, live in zip(one.targets, lives, strict=True)]


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
        changes = delta.changes(name, raw.numel())
        for start in range(0, raw.numel(), CHANGED_AT_ONCE):
            piece = raw[start : start + CHANGED_AT_ONCE]
            change = changes.read(start, start + piece.numel())
            if change is not None:
                piece.copy_(change.of(piece))
        changes.finish()
    touching[-1].check(name, digest_of(raw, touching[-1].checksum_format))
    return raw.view(value.dtype).view(value.shape)


def _compared(
    live: Live, name: str, full: SafetensorsFolder | None, deltas: list[DeltaFolder], part: Part | None, digest: Digest | None
) -> Iterator[Patch | None]:
    nbytes = live.nbytes if part is None else math.prod(part.shape) * live.dtype.itemsize
    readers = [delta.changes(name, nbytes) for delta in deltas]
    summed = full is None and part is None and digest is not None and add_in_place(digest, live)  # of the old bytes
    for span in spans(live, part):
        read = (one.read(span.start, span.start + span.nbytes) for one in readers)
        changes = [change for change in read if change is not None]
        if summed and not changes:
            continue
        old = live.bytes(span.box)
        new = span.put(old) if full is None else _stored(full, name, span, old)
        for change in changes:
            new = change.of(new)
        own = span.take(new)
        if digest is not None:
            if summed:
                digest.add(old, span.start, sign=-1)
            digest.add(new if span.columns is None else span.put(own), span.start)
            if digest.sums is not None:
                digest.sums.count -= span.nbytes - own.numel()  # zeros in the place of what is elsewhere
        if changes or full is not None:
            yield patch_of(live, span.box, old, own, keep_new=True)
    for one in readers:
        one.finish()


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
