"""What a session overwrites, kept on the host until it has committed; so that an abort brings the old generation back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from ..errors import ReloadError, StateError
from ..module.registry import AliasRegistry
from ..storage.coverage import Box, Coverage
from ..storage.kernel_name import RefusingName
from ..storage.states import State
from ..storage.storage import AliasedStorage
from .live import Live
from .patch import Patch, differences
from .targets import Target


class Journal:
    """Old bytes, where they differ from the new ones.

    Memory: at most 5 bytes of the host for each changed byte, and never more than what was overwritten; 32 MiB of scratch, which
    is 16 times a piece.

    Attributes:
        patches: the old bytes; whoever touched a tensor may add to them.
    """

    def __init__(self) -> None:
        self.patches: list[Patch] = []
        #: By memory: the version that it had before, and after each write of this reload; None while one goes on, or where an
        #: interrupt ended it.
        self._seen: dict[int, tuple[Live, int | None]] = {}
        self._kept: dict[int, Coverage] = {}
        self._lost: dict[int, str] = {}
        self._begun: set[int] = set()  # memory that was written, perhaps half-way
        self._ahead: dict[int, tuple[Target, int]] = {}  # of what was kept ahead: the version that it is of

    @property
    def lost(self) -> str | None:
        """Why it cannot restore, or None."""
        return next(iter(self._lost.values()), None)

    def touch(self, target: Target) -> None:
        """To be called before the first write of a tensor."""
        for one in target.together:  # which show refusing twins from that write on
            if id(one.tensor) not in self._kept:
                self._look_at(one)

    def _look_at(self, target: Target) -> None:
        live = Live(target.tensor)
        with _lock(live):
            found = _version(live)
            if live.storage is None:
                if any(isinstance(holder.get(key), RefusingName) for holder, key in target.places):
                    self._lost[id(target.tensor)] = f"{target.label} held no weights before: an earlier reload of it failed"
            elif _memory(live) not in self._seen and live.storage.state is not State.LOADED:
                self._lost[id(target.tensor)] = f"{target.label} held no whole weights before"
            self._seen.setdefault(_memory(live), (live, found))
        self._kept[id(target.tensor)] = Coverage(target.tensor.shape)

    def keep(self, target: Target, box: Box, value: Tensor, *, again: bool) -> None:
        """Keep what ``value`` is about to replace under ``box``. ``again``: what was kept there was kept for this very value."""
        self.touch(target)
        if not (again and self._kept[id(target.tensor)].covers(box)):
            self._keep(target, box, value)

    def write(self, target: Target, do: Callable[[], object]) -> None:
        """Every write of this reload, so that those of other code are told from them."""
        lives = [Live(one.tensor) for one in target.together]
        with _lock(lives[0]):
            for live in lives:
                if (why := self._changed(live)) is not None:
                    self._lost.setdefault(id(target.tensor), why)
            self._begun.add(_memory(lives[0]))
            self._seen |= {_memory(live): (live, None) for live in lives}
            try:
                do()
            finally:
                self._seen |= {_memory(live): (live, _version(live)) for live in lives}

    def keep_ahead(self, target: Target, box: Box, value: Tensor) -> None:
        """The same before the tensor is closed, while the old weights serve. A plain tensor may change unseen: not yet."""
        live = Live(target.tensor)
        if live.storage is not None and not target.shares_memory:
            self._ahead.setdefault(id(target.tensor), (target, live.version))
            self.touch(target)
            self._keep(target, box, value)

    def check_ahead(self) -> None:
        """To be called when tensors are closed and not written yet: of those that were written since, keep what is there now."""
        for key, (target, version) in self._ahead.items():
            live = Live(target.tensor)
            with _lock(live):
                changed = _version(live) != version
            if changed:
                self.patches = [patch for patch in self.patches if patch.live.tensor is not target.tensor]
                self._lost.pop(key, None)
                self._seen.pop(_memory(live), None)
                self._look_at(target)
        self._ahead = {}  # and not before: where an interrupt comes between, restore() does it again

    def restore(self) -> None:
        """Every byte as it was, and what derives from them.

        Raises:
            ReloadError: it cannot: see :attr:`lost`, or other code wrote the memory meanwhile.
            AliasError: processing refuses.
        """
        self.check_ahead()
        lives = [live for live, _ in self._seen.values()]
        for why in (self.lost, *map(self._changed, lives)):
            if why is not None:
                raise _cannot(why)
        for patch in reversed(self.patches):
            patch.put_old()
        storages = [live.storage for live in lives if live.storage is not None]
        for storage in storages:
            storage.accept()  # also where a write failed half-way: what it reached is old again
        listeners = {id(one): one for storage in storages for one in storage.listeners}
        for listener in listeners.values():
            if isinstance(listener, AliasRegistry):
                listener.process()

    def _keep(self, target: Target, box: Box, value: Tensor) -> None:
        """Also where another value was kept for, which was not written whole: restoring goes back over that one."""
        live, why = Live(target.tensor), None
        if self.lost is not None:
            return
        try:
            if live.storage is not None and _memory(live) in self._begun and live.storage.states.missing:
                why = self._accept(live.storage, live)
            if why is None:
                found = differences(live, box, value, keep_new=False)
                self.patches += [patch for patch in found if patch is not None]
        except StateError as error:
            why = error.message
        if why is not None:
            self._lost[id(target.tensor)] = why
        self._kept[id(target.tensor)].add(box)

    def _accept(self, storage: AliasedStorage, live: Live) -> str | None:
        """What a write of this reload left half-way holds bytes that are old, or in a patch. Why not, if other code wrote."""
        with storage.lock:
            if (why := self._changed(live)) is None:
                storage.accept()
                self._seen[_memory(live)] = live, storage.version
            return why

    def _changed(self, live: Live) -> str | None:
        """Other code wrote the memory since this reload first looked at it, or wrote it; None if nobody did."""
        with _lock(live):
            _, version = self._seen[_memory(live)]
            if version is None or _version(live) == version:
                return None
        if live.storage is None:
            return "a plain tensor was written by other code"
        return f"{live.storage.label}: {live.storage.states.why or 'it was written by other code'}"


def _memory(live: Live) -> int:
    return id(live.tensor if live.storage is None else live.storage)


def _version(live: Live) -> int:
    """What other code wrote before is noticed. The caller holds the lock."""
    if live.storage is not None:
        live.storage.notice()
    return 0 if live.storage is None and live.tensor.is_inference() else live.version  # torch counts none of those


def _lock(live: Live) -> AbstractContextManager[Any]:
    """Of its storage, if it has one. The lock itself: one in Python would be left held by an interrupt at its end."""
    return nullcontext() if live.storage is None else live.storage.lock


def _cannot(why: str) -> ReloadError:
    return ReloadError(
        "the journal cannot bring the old weights back",
        expected="memory that was loaded before, and that only this reload writes",
        found=why,
        remedy="Reload the whole model; until then it refuses.",
    )
