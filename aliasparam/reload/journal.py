"""What a session overwrites, kept on the host until it has committed; so that an abort brings the old generation back."""

from __future__ import annotations

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
        lost: why it cannot restore, or None.
        patches: the old bytes; whoever touched a tensor may add to them.
    """

    def __init__(self) -> None:
        self.lost: str | None = None
        self.patches: list[Patch] = []
        self._seen: dict[AliasedStorage, str | None] = {}  # as they were before the first write: why they would be invalid
        self._kept: dict[int, Coverage] = {}

    def touch(self, target: Target) -> None:
        """To be called before the first write of a tensor."""
        for one in target.together:  # which show refusing twins from that write on
            if id(one.tensor) not in self._kept:
                self._look_at(one)

    def _look_at(self, target: Target) -> None:
        storage = Live(target.tensor).storage
        if storage is None:
            if any(isinstance(holder.get(key), RefusingName) for holder, key in target.places):
                self.lost = f"{target.label} held no weights before: an earlier reload of it failed"
        elif storage not in self._seen:
            with storage.lock:
                storage.notice()
                if storage.states.common is not State.LOADED:
                    self.lost = f"{target.label} held no whole weights before"
                self._seen[storage] = storage.states.why
        self._kept[id(target.tensor)] = Coverage(target.tensor.shape)

    def keep(self, target: Target, box: Box, value: Tensor) -> None:
        """Keep what ``value`` is about to replace under ``box``."""
        self.touch(target)
        kept = self._kept[id(target.tensor)]
        if self.lost is not None or kept.covers(box):  # a write that failed, once more: what is there now is not old
            return
        try:
            found = differences(Live(target.tensor), box, value, keep_new=False)
            self.patches += [patch for patch in found if patch is not None]
        except StateError as error:
            self.lost = error.message
        kept.add(box)

    def restore(self) -> None:
        """Every byte as it was, and what derives from them.

        Raises:
            ReloadError: it cannot: see :attr:`lost`, or other code wrote the memory meanwhile.
            AliasError: processing refuses.
        """
        if self.lost is not None:
            raise _cannot(self.lost)
        for patch in reversed(self.patches):
            patch.put_old()
        for storage, why in self._seen.items():
            with storage.lock:
                storage.notice()
                if storage.states.why is not why:
                    raise _cannot(f"{storage.label}: {storage.states.why}")
                storage.accept()  # also where a write failed half-way: what it reached is old again
        listeners = {id(one): one for storage in self._seen for one in storage.listeners}
        for listener in listeners.values():
            if isinstance(listener, AliasRegistry):
                listener.process()


def _cannot(why: str) -> ReloadError:
    return ReloadError(
        "the journal cannot bring the old weights back",
        expected="memory that was loaded before, and that only this reload writes",
        found=why,
        remedy="Reload the whole model; until then it refuses.",
    )
