"""The changes of deltas to one tensor, taken in order as its bytes come by; and the digest of what they make."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .delta import Overwrite, XorRun
from .delta_folder import DeltaFolder
from .digest import PositionalAdler32
from .errors import DeltaError
from .hashers import hasher
from .held_file import memory_of


class Digest:
    """Of a tensor's new bytes, in order: adler32 on their device, the others on the host."""

    def __init__(self, kind: str) -> None:
        self.sums = PositionalAdler32() if kind == "adler32" else None
        self._state: Any = hasher(kind)

    def add(self, piece: Tensor, start: int, own: int) -> None:
        """``own`` of the piece's bytes count; the others are zeros."""
        if self.sums is not None:
            self.sums.add_run(piece, start)
            self.sums.count += own - piece.numel()
        else:
            self._state.update(memory_of(piece.cpu()))

    def hexdigest(self, nbytes: int) -> str:
        return str(self._state.hexdigest()) if self.sums is None else self.sums.hexdigest(nbytes)


class Cursor:
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
            if last <= start:  # of a part that is elsewhere
                self._now = None
                continue
            _change(self._now, piece, start, stop)
            changed = True
            if last > stop:
                return True
            self._now = None

    def finish(self, *, whole: bool) -> None:
        """The delta ends with the tensor (of a part: what is behind it is elsewhere, and read to the end). Raises DeltaError."""
        behind = self._now is not None
        for _ in self._pieces:
            behind = True
        if behind and whole:
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
