"""Delta folders applied to a live model, inside its kernel bytes.

While the old weights serve, each tensor that the delta names is read in pieces, changed in scratch and digested: a wrong base, a
wrong order or a damaged delta is found before a byte is written. What differs is kept on the host as (position in kernel memory,
old byte, new byte). The commit writes the new bytes; an abort writes the old ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .delta import Overwrite, XorRun
from .delta_folder import Chain, DeltaFolder
from .digest import PositionalAdler32
from .errors import DeltaError
from .hashers import hasher
from .held_file import memory_of
from .live import Live
from .observe import Hooks
from .patch import PIECE, Patch, joined, patch_of
from .session import ReloadSession
from .sources import SafetensorsFolder


def apply_delta(
    model: nn.Module,
    delta: DeltaFolder | Chain | str | Path,
    *,
    serving: int | None = None,
    names: Mapping[str, str] | None = None,
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
        names: name in the folder -> name in the model; without it they are the same.
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
        return _version(opened, serving)


def prepare_delta(
    model: nn.Module,
    delta: DeltaFolder | Chain,
    *,
    serving: int | None = None,
    names: Mapping[str, str] | None = None,
    hooks: Hooks | None = None,
) -> ReloadSession:
    """A prepared session, all checksums verified; the old weights serve until it commits. Else as :func:`apply_delta`."""
    full, deltas = _parts(delta)
    _need_order(deltas, None if full is not None else serving)
    session = ReloadSession(model, "partial", "delta", "delta", hooks or Hooks())
    session.begin()
    try:
        stored = dict.fromkeys(name for part in ([full] if full else deltas) for name in _names(part))
        stored |= dict.fromkeys(name for part in deltas for name in _names(part))
        if full is not None:
            _need_all(session, full, names)
        for name in stored:
            live_name = name if names is None else names.get(name, name)
            session.patch(live_name, lambda live, name=name: _patches(live, name, full, deltas))  # type: ignore[misc]
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


def _version(delta: DeltaFolder | Chain, serving: int | None) -> int:
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


def _need_all(session: ReloadSession, full: SafetensorsFolder, names: Mapping[str, str] | None) -> None:
    given = {name if names is None else names.get(name, name) for name in full.tensors}
    missing = sorted(session.expected.keys() - given)
    if missing:
        raise DeltaError("the full version lacks tensors", name=str(full.path), found="no " + ", ".join(missing[:5]))


def _patches(live: Live, name: str, full: SafetensorsFolder | None, deltas: list[DeltaFolder]) -> list[Patch]:
    """What differs in one tensor, after its new bytes were verified."""
    touching = [delta for delta in deltas if name in delta.checksums]
    if full is not None:
        _need_fit(full, name, live)
    cursors = [_Cursor(delta, name, live.nbytes) for delta in touching]
    kind = touching[-1].checksum_format if touching else None
    digest = _Digest(kind) if kind is not None else None
    found, version = [], live.version
    for start, box in live.pieces(PIECE):
        old = live.bytes(box)
        new = old.clone() if full is None else _stored(full, name, start, old)
        changes = [cursor.apply(new, start) for cursor in cursors]
        if digest is not None:
            digest.add(new, start)
        if full is not None or any(changes):
            patch = patch_of(live, box, old, new, keep_new=True)
            found += [patch] if patch is not None else []
    for cursor in cursors:
        cursor.finish()
    if digest is not None:
        touching[-1].check(name, digest.hexdigest(live.nbytes))
    if live.version != version:
        raise DeltaError("the live tensor changed while the delta was checked against it", name=name)
    return joined(found)


def _stored(full: SafetensorsFolder, name: str, start: int, like: Tensor) -> Tensor:
    raw = torch.empty(like.numel(), dtype=torch.uint8, pin_memory=like.is_cuda)
    full.raw(name, start, raw)
    return raw.to(like.device)


def _need_fit(full: SafetensorsFolder, name: str, live: Live) -> None:
    entry = full.entry(name)
    if (entry.dtype, tuple(entry.shape)) != (live.dtype, live.shape):
        expected, found = f"{live.dtype} {list(live.shape)}", f"{entry.dtype} {list(entry.shape)}"
        raise DeltaError("the full version does not fit the model", name=f"{full.path}: {name}", expected=expected, found=found)


class _Digest:
    """Of a tensor's new bytes, in order: adler32 on their device, the others on the host."""

    def __init__(self, kind: str) -> None:
        self._sums = PositionalAdler32() if kind == "adler32" else None
        self._state: Any = hasher(kind)

    def add(self, piece: Tensor, start: int) -> None:
        if self._sums is not None:
            self._sums.add_run(piece, start)
        else:
            self._state.update(memory_of(piece.cpu()))

    def hexdigest(self, nbytes: int) -> str:
        return str(self._state.hexdigest()) if self._sums is None else self._sums.hexdigest(nbytes)


class _Cursor:
    """The changes of one delta to one tensor, taken in order as the tensor's bytes come by."""

    def __init__(self, delta: DeltaFolder, name: str, nbytes: int) -> None:
        self._name = f"{delta.path}: {name}"
        self._pieces: Iterator[XorRun | Overwrite] = delta.pieces(name, nbytes)
        self._now: XorRun | Overwrite | None = None

    def apply(self, piece: Tensor, start: int) -> bool:
        """Change ``piece``, the tensor's bytes from ``start`` on, in place; whether there was anything."""
        stop, changed = start + piece.numel(), False
        while True:
            self._now = self._now if self._now is not None else next(self._pieces, None)
            if self._now is None:
                return changed
            first, last = _ends(self._now)
            if first >= stop:
                return changed
            _change(self._now, piece, start, stop)
            changed = True
            if last > stop:
                return True
            self._now = None

    def finish(self) -> None:
        """The delta ends with the tensor. Raises DeltaError."""
        if self._now is not None or next(self._pieces, None) is not None:
            raise DeltaError("the delta changes bytes behind the tensor", name=self._name)


def _ends(change: XorRun | Overwrite) -> tuple[int, int]:
    if isinstance(change, XorRun):
        return change.start, change.start + change.values.numel()
    return int(change.positions[0]), int(change.positions[-1]) + 1


def _change(change: XorRun | Overwrite, piece: Tensor, start: int, stop: int) -> None:
    if isinstance(change, XorRun):
        first, last = max(change.start, start), min(change.start + change.values.numel(), stop)
        piece[first - start : last - start] ^= change.values[first - change.start : last - change.start].to(piece.device)
        return
    first, last = torch.searchsorted(change.positions, torch.tensor([start, stop])).tolist()
    piece[(change.positions[first:last] - start).to(piece.device)] = change.values[first:last].to(piece.device)
