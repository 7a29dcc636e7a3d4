"""Delta folders applied to a live model, inside its kernel bytes.

While the old weights serve, each tensor that the delta names is read in pieces, changed in scratch and digested: a wrong base, a
wrong order or a damaged delta is found before a byte is written. What differs is kept on the host as (position in kernel memory,
old byte, new byte). The commit writes the new bytes; an abort writes the old ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from .delta_converted import patch_converted
from .delta_cursor import Cursor
from .delta_folder import Chain, DeltaFolder
from .delta_held import Part, Places, Span, spans
from .delta_parts import PartDigests
from .errors import DeltaError
from .live import Live
from .observe import Hooks
from .patch import Patch, joined, patch_of
from .session import ReloadSession
from .sources import SafetensorsFolder


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
    that differs, at most twice the tensor's; device scratch: a few pieces of 8 MiB.

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
    with ExitStack() as stack:
        opened = stack.enter_context(DeltaFolder(delta)) if isinstance(delta, (str, Path)) else delta
        with prepare_delta(model, opened, serving=serving, names=names, hooks=hooks) as session:
            session.commit()
        return version_of(opened, serving)


def prepare_delta(
    model: nn.Module,
    delta: DeltaFolder | Chain,
    *,
    serving: int | None = None,
    names: Mapping[str, str] | Places | None = None,
    hooks: Hooks | None = None,
) -> ReloadSession:
    """A prepared session, all checksums verified; the old weights serve until it commits. Else as :func:`apply_delta`."""
    full, deltas = _parts(delta)
    _need_order(deltas, None if full is not None else serving)
    places = names if isinstance(names, Places) else Places(names or {})
    digests = PartDigests(places)
    session = ReloadSession(model, "partial", "delta", "delta", hooks or Hooks())
    session.begin()
    try:
        if full is not None:
            _need_all(session, full, places)
        stored = dict.fromkeys(name for one in ([full] if full else []) + deltas for name in _names(one))
        for one in places.converted:
            if not stored.keys().isdisjoint(one.sources):
                patch_converted(session, one, full, deltas)
        apart = {*places.elsewhere, *(name for one in places.converted for name in one.sources)}
        for name in [name for name in stored if name not in apart]:
            for label, box in places.where(name):
                session.patch(label, lambda live, at=(name, box): _patches(live.under(at[1]), at[0], full, deltas, digests))  # type: ignore[misc]
        digests.check(deltas)
        delta.check_unchanged()
        session.prepare()
    except BaseException:
        session.abort()
        raise
    return session


def _parts(delta: DeltaFolder | Chain) -> tuple[SafetensorsFolder | None, list[DeltaFolder]]:
    return (None, [delta]) if isinstance(delta, DeltaFolder) else (delta.full, delta.deltas)


def _names(part: SafetensorsFolder | DeltaFolder) -> list[str]:
    return list(part.tensors if isinstance(part, SafetensorsFolder) else part.checksums)


def version_of(delta: DeltaFolder | Chain, serving: int | None) -> int:
    """What the model is afterwards."""
    full, deltas = _parts(delta)
    if deltas:
        return deltas[-1].version
    return serving or 0 if full is None else int(full.path.name.rpartition("_v")[2])


def _need_order(deltas: list[DeltaFolder], serving: int | None) -> None:
    for delta in deltas:
        if serving is not None and delta.base_version != serving:
            raise DeltaError(
                "the delta applies to another version",
                name=str(delta.path),
                expected=f"a delta on version {serving}, which serves or comes before",
                found=f"one on version {delta.base_version}",
                remedy="Apply the chain of deltas in order, or start from a full version.",
            )
        serving = delta.version


def _need_all(session: ReloadSession, full: SafetensorsFolder, places: Places) -> None:
    given = {places.here(name) for name in full.tensors} | {name for one in places.converted for name in one.targets}
    missing = sorted(session.expected.keys() - given)
    if missing:
        raise DeltaError("the full version lacks tensors", name=str(full.path), found="no " + ", ".join(missing[:5]))


def _patches(live: Live, name: str, full: SafetensorsFolder | None, deltas: list[DeltaFolder], parts: PartDigests) -> list[Patch]:
    """What differs in one tensor, after its new bytes were verified."""
    part = parts.part_of(name, live)
    nbytes = live.nbytes if part is None else math.prod(part.shape) * live.dtype.itemsize
    touching = [delta for delta in deltas if name in delta.checksums]
    if full is not None:
        _need_fit(full, name, live, part)
    cursors = [Cursor(delta, name, nbytes) for delta in touching]
    kind = touching[-1].checksum_format if touching else None
    digest = parts.digest(name, part, touching[-1], live.dtype.itemsize) if kind is not None else None
    found, version = [], live.version
    for span in spans(live, part):
        old = live.bytes(span.box)
        new = span.put(old) if full is None else _stored(full, name, span, old)
        changes = [cursor.apply(new, span.start) for cursor in cursors]
        own = span.take(new)
        if digest is not None:
            digest.add(new if span.columns is None else span.put(own), span.start, own.numel())
        if full is not None or any(changes):
            patch = patch_of(live, span.box, old, own, keep_new=True)
            found += [patch] if patch is not None else []
    for cursor in cursors:
        cursor.finish(whole=part is None)
    if digest is not None and part is None:
        touching[-1].check(name, digest.hexdigest(nbytes))
    if live.version != version:
        raise DeltaError("the live tensor changed while the delta was checked against it", name=name)
    return joined(found)


def _stored(full: SafetensorsFolder, name: str, span: Span, like: Tensor) -> Tensor:
    raw = torch.empty(span.nbytes, dtype=torch.uint8, pin_memory=like.is_cuda)
    full.raw(name, span.start, raw)
    return raw.to(like.device)


def _need_fit(full: SafetensorsFolder, name: str, live: Live, part: Part | None) -> None:
    entry, shape = full.entry(name), live.shape if part is None else part.shape
    if (entry.dtype, tuple(entry.shape)) != (live.dtype, shape):
        expected, found = f"{live.dtype} {list(shape)}", f"{entry.dtype} {list(entry.shape)}"
        raise DeltaError("the full version does not fit the model", name=f"{full.path}: {name}", expected=expected, found=found)
