"""Delta folders applied to a live model, inside its kernel bytes.

While the old weights serve, what each tensor that the delta names would become is computed in scratch and digested: a wrong
base, a wrong order or a damaged delta is found before a byte is written. What differs is kept on the host as (position in kernel
memory, old byte, new byte). The commit writes the new bytes; an abort writes the old ones.

A tensor is read in pieces, changed in scratch, digested and compared. An adler32 that is summed where the bytes lie (on a GPU),
or of a delta that names few positions, is that of the old bytes, corrected: the pieces or positions that change alone are
looked at. What is another tensor in the model (see
:class:`~aliasparam.reload.delta_held.Converted`) is converted as a whole, on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..host import host_bytes
from ..layout.boxes import Box, whole
from ..module.registry import need_model
from ..spec import TensorSpec
from ..storage.coverage import Coverage
from .delta import Overwrite, Xor
from .delta_folder import Chain, DeltaFolder, need_order
from .delta_held import Converted, Part, PartDigests, Places, Span, spans
from .digest import Hashed, PositionalAdler32
from .errors import DeltaError
from .header import Entry
from .live import Live
from .live_digest import add_in_place, add_pieces
from .observe import Hooks
from .patch import Patch, differences, joined, on_device, patch_at, patch_of, patched
from .session import ReloadSession
from .sources import SafetensorsFolder

#: Looks at what changes in a tensor of the model: its name, the tensor or a part of it, and the patches.
Check: TypeAlias = Callable[[str, Live, Sequence[Patch]], None]


def apply_delta(
    model: nn.Module,
    delta: DeltaFolder | Chain | str | Path,
    *,
    serving: int | None = None,
    names: Mapping[str, str] | Places | None = None,
    hooks: Hooks | None = None,
) -> int:
    """Bring a serving model to the version that ``delta`` makes, or leave it as it is; returns that version.

    The pause is the commit: it writes the bytes that differ, and computes what derives from them. Host memory: 6 bytes for each
    that differs, at most twice the tensor's, and while it is prepared once more where it shares memory with another; device
    scratch: a few pieces of 8 MiB.

    Args:
        model: of the version that the delta is based on.
        delta: a folder, opened or by path, or a chain of them, which may begin with a full version.
        serving: the version that serves now, if known: a delta on another one is refused before anything is read. (Of tensors
            that a delta does not name there is no checksum.)
        names: name in the folder -> name in the model; without it they are the same. Or :class:`Places`, where tensors are
            held in parts or converted.
        hooks: as for :func:`~aliasparam.reload.reload`.

    Raises:
        DeltaError: wrong version, order, names or checksums, or a malformed delta. The old weights serve.
        SourceError: files changed while they were read. The old weights serve.
        ReloadError: another reload is open.
        AliasError: processing refuses the new values. The old weights serve again.
    """
    need_model(model)  # before the folder is opened
    with opened_delta(delta) as chain, prepare_delta(model, chain, serving=serving, names=names, hooks=hooks) as session:
        session.commit()
        return chain.version


def prepare_delta(
    model: nn.Module,
    delta: DeltaFolder | Chain | str | Path,
    *,
    serving: int | None = None,
    names: Mapping[str, str] | Places | None = None,
    hooks: Hooks | None = None,
    check: Check | None = None,
) -> ReloadSession:
    """A prepared session, all checksums verified; the old weights serve until it commits. Else as :func:`apply_delta`.

    Args:
        check: called for each tensor, or part of one, that the files name. What it raises refuses the delta.
    """
    need_model(model)
    places = names if isinstance(names, Places) else Places(names or {})
    with opened_delta(delta) as chain:  # of its files nothing is read afterwards
        need_order(chain.deltas, None if chain.full is not None else serving)
        session = ReloadSession(model, "partial", "delta", "delta", hooks or Hooks())
        session.begin()
        try:
            if chain.full is not None:
                _need_all(session, chain.full, places)
            _patch_all(session, chain.full, chain.deltas, places, check)
            chain.check_unchanged()
            session.prepare()
        except BaseException:
            session.abort()
            raise
        return session


def opened_delta(delta: DeltaFolder | Chain | str | Path) -> AbstractContextManager[DeltaFolder | Chain]:
    """What the caller has opened, and closes; or what is at a path, closed at the end."""
    return DeltaFolder(delta) if isinstance(delta, (str, Path)) else nullcontext(delta)


def _patch_all(
    session: ReloadSession, full: SafetensorsFolder | None, deltas: list[DeltaFolder], places: Places, check: Check | None
) -> None:
    digests, tensors, taken = PartDigests(places), session.tensors, dict[str, Coverage]()

    def hold(label: str, live: Live, patches: list[Patch], box: Box | None, name: str) -> None:
        session.hold(label, live, patches)
        if check is not None:
            check(label, live, patches)
        covered = taken.setdefault(label, Coverage(tensors[label].shape))
        if not covered.add(whole(covered.shape) if box is None else box):
            raise DeltaError("two tensors of the files lie in one place of the model", name=label, found=f"{name} after another")

    stored = dict.fromkeys([*(full.tensors if full is not None else ()), *(name for one in deltas for name in one.checksums)])
    for one in places.converted:
        if not stored.keys().isdisjoint(one.sources):
            lives = [session.watch(label) for label in one.targets]
            for label, live, patches in zip(one.targets, lives, patches_of_converted(one, lives, full, deltas), strict=True):
                hold(label, live, patches, None, ", ".join(one.sources))
    apart = {*places.elsewhere, *(name for one in places.converted for name in one.sources)}
    for name in [name for name in stored if name not in apart]:
        for label, box in places.where(name):
            live = session.watch(label).under(box)
            hold(label, live, patches_of(live, name, full, deltas, digests), box, name)
    digests.check(deltas)


def _need_all(session: ReloadSession, full: SafetensorsFolder, places: Places) -> None:
    given = {places.here(name) for name in full.tensors} | {name for one in places.converted for name in one.targets}
    missing = sorted(session.expected.keys() - given)
    if missing:
        raise DeltaError("the full version lacks tensors", name=str(full.path), found="no " + ", ".join(missing[:5]))


# -- what changes in one tensor ------------------------------------------------------------------------------------------


def patches_of(
    live: Live, name: str, full: SafetensorsFolder | None, deltas: list[DeltaFolder], parts: PartDigests
) -> list[Patch]:
    """What differs in one tensor, after its new bytes were verified (those of a part by ``parts.check``, later).

    Raises:
        DeltaError: a malformed delta, or a checksum that differs; the tensor does not fit.
    """
    part = parts.part_of(name, live)
    spec = TensorSpec(part.shape, live.dtype)
    touching = [delta for delta in deltas if name in delta.checksums]
    entry = None if full is None else full.entry(name)
    if entry is not None:
        _need_fit("the full version", f"{entry.file.path}: {name}", spec, TensorSpec(entry.shape, entry.dtype))
    digest = parts.digest(name, touching[-1], spec.nbytes) if touching else None
    readers = [delta.changes(name, spec) for delta in touching]
    found = joined(_compared(live, entry, readers, part, digest))
    if digest is not None and name not in parts.held:
        touching[-1].check(name, digest.hexdigest(spec.nbytes))
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
    if not any(name in delta.checksums for delta in deltas):
        return value
    live = Live(value)
    return patched(live, patches_of(live, name, None, deltas, PartDigests(Places()))).tensor


def _compared(
    live: Live,
    full: Entry | None,
    readers: Sequence[Xor | Overwrite],
    part: Part,
    digest: PositionalAdler32 | Hashed | None,
) -> Iterator[Patch | None]:
    summed = None
    if isinstance(digest, PositionalAdler32) and full is None and part.shape == live.shape:
        sparse = _sparse(live, readers)
        if add_in_place(digest, live):
            summed = digest  # with all old bytes in it
        elif sparse is not None:
            add_pieces(digest, live)
        if sparse is not None:
            yield from _corrected(live, sparse, digest)
            return
    for span in spans(live, part):
        read = (one.read(span.start, span.start + span.nbytes) for one in readers)
        changes = [change for change in read if change is not None]
        if summed is not None and not changes:
            continue
        old = live.bytes(span.box)
        new = span.put(old) if full is None else _stored(full, span, old)
        for change in changes:
            new = change.of(new)
        own = span.take(new)
        if digest is not None:
            _add(digest, span, own)
        if summed is not None:
            summed.add(old, span.start, sign=-1)
        if changes or full is not None:
            yield patch_of(live, span.box, old, own, keep_new=True)
    for one in readers:
        one.finish()


def _sparse(live: Live, readers: Sequence[Xor | Overwrite]) -> Overwrite | None:
    """The one delta, if it names so few positions that they and their bytes are less than the tensor's old and new bytes."""
    [one, *others] = readers
    if others or not isinstance(one, Overwrite) or 3 * one.count >= live.nbytes:
        return None
    return None if live.positions(torch.empty(0, dtype=torch.int64, device=live.device)) is None else one


def _corrected(live: Live, changes: Overwrite, digest: PositionalAdler32) -> Iterator[Patch]:
    """What differs at the positions that a delta names; ``digest``, of the old bytes, becomes that of the new."""
    for values, at in changes.blocks:
        at, new = on_device(at, live.device), on_device(values, live.device)
        places = live.positions(at)
        if places is None:
            raise AssertionError("bytes have places of their own, or not")
        old = live.bytes_at(places)
        digest.change(old, new, at)
        differs = old != new
        if differs.any():
            yield patch_at(live, places[differs], old[differs], new[differs])


def _add(digest: PositionalAdler32 | Hashed, span: Span, own: Tensor) -> None:
    """The new bytes of a span: of sums, with zeros in the place of what is elsewhere."""
    digest.add(span.put(own), span.start)
    if isinstance(digest, PositionalAdler32):
        digest.count -= span.nbytes - own.numel()


def _stored(full: Entry, span: Span, like: Tensor) -> Tensor:
    raw = host_bytes(span.nbytes, pinned=like.is_cuda)
    full.fill(raw, span.start)
    return raw.to(like.device)


def _need_fit(what: str, name: str, expected: TensorSpec, found: TensorSpec) -> None:
    if found != expected:
        raise DeltaError(f"{what} does not fit the model", name=name, expected=f"{expected}", found=f"{found}")


def _replaced(live: Live, name: str, value: Tensor) -> list[Patch]:
    _need_fit("the converted tensor", name, TensorSpec(live.shape, live.dtype), TensorSpec.of(value))
    return joined(differences(live, live.box, value, keep_new=True))
