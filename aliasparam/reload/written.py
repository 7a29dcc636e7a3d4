"""What a session has written, and what becomes of it. Apart from the session, so that an abandoned one can still be ended."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ReloadError
from ..module.names import ModuleNames
from ..storage.coverage import Box
from .digest import Hashed
from .drain import Drain
from .live import Live, part_of
from .live_digest import add_pieces
from .targets import PlainName, Target


class Given(NamedTuple):
    """What a tensor, or a part of it, is to hold at the end: the SHA-256 (hex) of its bytes."""

    target: Target
    part: Live
    digest: str


class Written:
    """The tensors that were begun: declared names, and plain ones behind their refusing twins."""

    def __init__(self, label: str, drain: Drain) -> None:
        self.label, self._drain = label, drain
        self._begun: dict[int, tuple[Target, PlainName | None]] = {}  # a plain one with its twin
        self._given: list[Given] = []  # to tensors that share memory
        self._ended = False

    @property
    def any(self) -> bool:
        """Whether a tensor was begun."""
        return bool(self._begun)

    def write(self, target: Target, box: Box, value: Tensor) -> None:
        """Write ``value`` in place, as ``copy_`` does, into a tensor that was begun."""
        part = part_of(target.tensor, box)
        with torch.no_grad():
            part.copy_(value)
        if target.shares_memory:
            self.give(target, Live(part), Live(value))

    def give(self, target: Target, part: Live, value: Live) -> None:
        """``part`` of a tensor that shares memory must hold these bytes at the end, whatever the others are given."""
        self._given.append(Given(target, part, _sha256(value)))

    def need_agreement(self) -> None:
        """
        Raises:
            ReloadError: tensors that share memory were given bytes that differ.
        """
        for target, part, digest in self._given:
            others = {one.target.label for one in self._given if one.target in target.together and one.target is not target}
            if others and _sha256(part) != digest:
                raise ReloadError(
                    "it shares memory with tensors that were given other values",
                    module=self.label,
                    name=target.label,
                    expected="values that agree where they are in one memory",
                    found="others for " + ", ".join(sorted(others)),
                    remedy="Send one of them alone, or untie them in the model.",
                )

    def begin(self, targets: Iterable[Target]) -> None:
        """The tensors are about to be written: they refuse from now on, and nobody reads them any more.

        Raises:
            ReloadError: a forward that began before did not end in time. They serve on.
        """
        new = [t for target in targets for t in target.together if id(t.tensor) not in self._begun]
        begun = {id(t.tensor): (t, None if t.storage is not None else PlainName(t.label, t.tensor)) for t in new}
        if not begun:
            return
        names = {id(one): one for t in new if t.storage is not None for one in t.storage.listeners}
        registries = [one for one in names.values() if isinstance(one, ModuleNames)]
        twins = [(holder, key, twin.refusing) for t, twin in begun.values() if twin is not None for holder, key in t.places]
        try:
            self._begun |= begun  # before, as an interrupt may come when twins are in their places
            if twins or not all(self._drain.holds(one) for one in registries):
                self._drain.close(registries, twins)
        except BaseException:
            for key in begun:
                self._begun.pop(key, None)
            raise

    def reopen(self) -> None:
        """What was processed refuses again, with its new weights in place."""
        for target, _ in self._begun.values():
            if target.storage is not None:
                with target.storage.lock:
                    target.storage.tell()

    def commit(self, *, whole: bool) -> None:
        """Everything that was written may be read. ``whole``: what an earlier reload left refusing was written too."""
        for target, twin in self._begun.values():
            for holder, key in target.places:
                if twin is not None and (whole or holder.get(key) is twin.refusing):
                    dict.__setitem__(holder, key, target.tensor)
        self._ended = True

    def poison(self) -> None:
        """What was written is of no generation: it refuses until it is loaded whole. Plain twins stay where they are."""
        if self._ended:
            return
        for target, _ in self._begun.values():
            if target.storage is not None:
                target.storage.invalidate("a reload failed after it had written this tensor")
        self._ended = True


def _sha256(live: Live) -> str:
    """No weaker sum: small numbers in another order have the same adler32."""
    digest = Hashed("hashlib", "sha256")
    add_pieces(digest, live)
    return digest.hexdigest(live.nbytes)
