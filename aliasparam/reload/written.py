"""What a session has written, and what becomes of it. Apart from the session, so that an abandoned one can still be ended."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ReloadError
from ..module.names import ModuleNames
from ..storage.coverage import Box
from ..tensors.faces import _Aliased
from .digest import Hashed
from .drain import Drain
from .live import Live, part_of
from .live_digest import add_pieces
from .targets import PlainName, Target

_FAILED = "a reload failed after it had written this tensor"


class Given(NamedTuple):
    """What a tensor, or a part of it, is to hold at the end: the SHA-256 (hex) of its bytes."""

    target: Target
    part: Live
    digest: str


class Written:
    """The tensors that were begun: declared names, and plain ones behind their refusing twins."""

    def __init__(self, label: str, drain: Drain) -> None:
        self.label, self._drain = label, drain
        self._declared: dict[int, _Aliased] = {}
        self._plain: dict[int, tuple[PlainName, Target]] = {}
        self._given: list[Given] = []  # to tensors that share memory
        self._ended = False

    @property
    def any(self) -> bool:
        """Whether a tensor was begun."""
        return bool(self._declared or self._plain)

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
        new = {id(t.tensor): t for target in targets for t in target.together if not self._is_begun(t)}
        declared = {key: t.tensor for key, t in new.items() if isinstance(t.tensor, _Aliased)}
        plain = {key: (PlainName(t.label, t.tensor), t) for key, t in new.items() if key not in declared}
        if not new:
            return
        names = {id(one): one for tensor in declared.values() for one in tensor._alias_storage.listeners}
        registries = [one for one in names.values() if isinstance(one, ModuleNames)]
        twins = [(holder, key, name.refusing) for name, target in plain.values() for holder, key in target.places]
        try:
            self._declared |= declared  # before, as an interrupt may come when twins are in their places
            self._plain |= plain
            if plain or not all(self._drain.holds(one) for one in registries):
                self._drain.close(registries, twins)
        except BaseException:
            for key in new:
                self._declared.pop(key, None)
                self._plain.pop(key, None)
            raise

    def _is_begun(self, target: Target) -> bool:
        return id(target.tensor) in self._declared or id(target.tensor) in self._plain

    def reopen(self) -> None:
        """What was processed refuses again, with its new weights in place."""
        for tensor in self._declared.values():
            with tensor._alias_storage.lock:
                tensor._alias_storage.tell()

    def commit(self, *, whole: bool) -> None:
        """Everything that was written may be read. ``whole``: what an earlier reload left refusing was written too."""
        for name, target in self._plain.values():
            for holder, key in target.places:
                if whole or holder.get(key) is name.refusing:
                    dict.__setitem__(holder, key, target.tensor)
        self._ended = True

    def poison(self) -> None:
        """What was written is of no generation: it refuses until it is loaded whole. Plain twins stay where they are."""
        if self._ended:
            return
        for tensor in self._declared.values():
            tensor._alias_storage.invalidate(_FAILED)
        self._ended = True

    def abandon(self) -> None:
        """:meth:`poison` by the garbage collector: whoever looks at a tensor next carries it out."""
        if self._ended:
            return
        for tensor in self._declared.values():
            tensor._alias_storage.invalidate_later(_FAILED)


def _sha256(live: Live) -> str:
    """No weaker sum: small numbers in another order have the same adler32."""
    digest = Hashed("hashlib", "sha256")
    add_pieces(digest, live)
    return digest.hexdigest(live.nbytes)
