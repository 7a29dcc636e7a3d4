"""What a session overwrites, kept on the host until it has committed; so that an abort brings the old generation back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor

from ..errors import ReloadError, StateError
from ..module.registry import AliasRegistry
from ..storage.coverage import Box
from ..storage.kernel_name import RefusingName
from ..storage.states import State
from .live import Live
from .patch import Patch, differences, on_host
from .targets import Target


class _Memory:
    """A storage, or the memory of plain tensors that lie in one: how a session found it, and what it keeps of it.

    Attributes:
        first: the version of its bytes when the session first looked at it.
        state: what the old bytes are: LOADED, or FOREIGN, which no checkpoint name reads.
        version: of its bytes, when the session first looked at it and after each of its writes; None while one goes on, or where
            an interrupt ended it. So writes of other code are noticed.
        begun: it was written, perhaps half-way.
        ahead: all that the values which are staged for it are to replace was kept.
        patches: the old bytes; of FOREIGN ones ``kernel_bytes``, all.
        lost: why they cannot be brought back, or None.
    """

    def __init__(self, target: Target) -> None:
        self.target, self.storage = target, target.storage
        self.patches: list[Patch] = []
        self.kernel_bytes: Tensor | None = None
        self.begun = self.ahead = False
        with self.lock:
            self.version: object = self.now()
            self.first = 0 if self.storage is None else self.storage.version
            self.state = State.LOADED if self.storage is None else self.storage.state
            self.lost = None if self._is_whole() else f"{target.label} held no whole weights before"

    @property
    def nbytes(self) -> int:
        """Host memory."""
        return sum(p.nbytes for p in self.patches) + (0 if self.kernel_bytes is None else self.kernel_bytes.nbytes)

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """The storage's own: one in Python would be left held by an interrupt at its end."""
        return nullcontext() if self.storage is None else self.storage.lock

    def _is_whole(self) -> bool:
        if self.storage is not None:
            return self.state in (State.LOADED, State.FOREIGN)
        places = [place for one in self.target.together for place in one.places]
        return not any(isinstance(holder.get(key), RefusingName) for holder, key in places)

    def now(self) -> object:
        """The version. The caller holds the lock."""
        return [Live(one.tensor).version for one in self.target.together]

    def changed(self) -> str | None:
        """Other code wrote it since the session looked at it, or wrote it; None if nobody did."""
        with self.lock:
            if self.version is None or self.now() == self.version:
                return None
        if self.storage is None:
            return "a plain tensor was written by other code"
        return f"{self.storage.label}: {self.storage.states.why or 'it was written by other code'}"

    def need_unchanged(self) -> None:
        """
        Raises:
            ReloadError: it was written since a delta was checked against it.
        """
        if self.changed() is not None:
            raise ReloadError("the tensor changed since the delta was checked against it", name=self.target.label)

    def put_new(self) -> None:
        """Write the new bytes of the patches, where they were made for."""
        with self.lock:
            self.need_unchanged()  # also since forwards were waited for
            self._accept()
            for patch in self.patches:
                self.write(partial(patch.put, patch.new))

    def need_own(self) -> None:
        """
        Raises:
            ReloadError: its old bytes cannot be brought back.
        """
        why = self.lost or self.changed()
        if why is not None:
            raise ReloadError(
                "the journal cannot bring the old weights back",
                expected="memory that was loaded before, and that only this reload writes",
                found=why,
                remedy="Reload the whole model; until then it refuses.",
            )

    def put_old(self) -> None:
        """Write the old bytes. It is whole then, also where a write failed half-way: what that reached is old again."""
        with self.lock:
            self.need_own()
            for patch in reversed(self.patches):
                patch.put(patch.old)
            if self.storage is None:
                return
            if self.kernel_bytes is not None:
                self.storage.elements.copy_(self.kernel_bytes)
            self.storage.accept(self.state)
            for names in self.storage.listeners:
                if isinstance(names, AliasRegistry):
                    names.same_values(self.storage, self.first)

    def keep(self, target: Target, box: Box, value: Tensor) -> None:
        """Keep what ``value`` is about to replace under ``box``, also where another value was kept for, which was not written
        whole: restoring goes back over that one."""
        try:
            self._accept()
            if self.lost is None and self.storage is not None and self.state is State.FOREIGN:
                self.kernel_bytes = on_host(self.storage.elements) if self.kernel_bytes is None else self.kernel_bytes
            elif self.lost is None:
                found = differences(Live(target.tensor), box, value, keep_new=False)
                self.patches += [patch for patch in found if patch is not None]
        except StateError as error:
            self.lost = error.message

    def _accept(self) -> None:
        """What a write of this session left half-way holds bytes that are old, or in a patch; unless other code wrote."""
        if not self.begun or self.storage is None or self.state is State.FOREIGN or not self.storage.states.missing:
            return
        with self.lock:
            self.lost = self.changed()
            if self.lost is None:
                self.storage.accept(State.LOADED)
                self.version = self.now()

    def write(self, do: Callable[[], object]) -> None:
        """Every write of this session, so that those of other code are told from them."""
        with self.lock:
            self.lost = self.lost or self.changed()
            self.begun, self.version = True, None
            try:
                do()
            finally:
                self.version = self.now()


class Journal:
    """Old bytes, where they differ from the new ones.

    Memory: at most 5 bytes of the host for each changed byte, and never more than what was overwritten, but all kernel bytes of
    undeclared code; 32 MiB of scratch, which is 16 times a piece.
    """

    def __init__(self) -> None:
        self._memories: dict[int, _Memory] = {}

    @property
    def nbytes(self) -> int:
        """Host memory."""
        return sum(memory.nbytes for memory in self._memories.values())

    def touch(self, target: Target) -> _Memory:
        """To be called before the first write of a tensor: those in its memory show refusing twins from that write on."""
        key = id(target.storage or target.together[0])
        found = self._memories.get(key)
        if found is None:
            found = self._memories[key] = _Memory(target)
        return found

    def need_unchanged(self) -> list[_Memory]:
        """What is to be begun: it has patches, or refuses since an earlier reload and is found to hold the new bytes already. All
        of it, and what is left as it is, is as a delta was checked against it, or this raises."""
        for memory in self._memories.values():
            memory.need_unchanged()
        return [memory for memory in self._memories.values() if memory.patches or memory.lost]

    def look_again(self) -> None:
        """Drop what was kept ahead of memory that other code wrote since. To be called when it is closed and not written yet."""
        for key, memory in self._memories.items():
            if not memory.begun and memory.changed() is not None:
                self._memories[key] = _Memory(memory.target)

    def restore(self) -> None:
        """Every byte as it was, and what derives from them.

        Raises:
            ReloadError: it cannot: memory held no whole weights before, or other code wrote it meanwhile.
            AliasError: processing refuses.
        """
        self.look_again()
        memories = list(self._memories.values())
        for memory in memories:
            memory.need_own()
        for memory in memories:
            memory.put_old()
        storages = [memory.storage for memory in memories if memory.storage is not None]
        listeners = {id(one): one for storage in storages for one in storage.listeners}
        for listener in listeners.values():
            if not isinstance(listener, AliasRegistry):
                continue
            try:
                listener.need_loaded()
            except StateError:  # some of its names lacked elements before too, or wait for undeclared code: it refuses on
                continue
            listener.process()
