"""AliasedStorage: one allocation, several formats. Writing it, lending it out, copying it.

Its bytes, names and states are in _bytes.py, its conversions in _converting.py.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._converting import ConvertibleStorage
from ._regions import covered, name_over, regions_of
from ._states import State as State


class Write(NamedTuple):
    """One write in progress: see :meth:`AliasedStorage.before_write`."""

    regions: range
    #: It holds every byte of its regions.
    covers: bool
    #: What was there before is not kept.
    overwrites: bool
    #: Regions which it moved, and the states they were in.
    moved: list[tuple[int, State]]


@contextmanager
def all_locked(storages: Iterable[AliasedStorage]) -> Iterator[None]:
    """Hold several locks, taken in one order by everybody, so that no two wait for each other. See [Note: threads]."""
    with ExitStack() as locks:
        for storage in sorted(storages, key=id):
            locks.enter_context(storage.lock)
        yield


class AliasedStorage(ConvertibleStorage):
    """A fixed buffer which knows, region by region, in which format its bytes are."""

    # -- writing -------------------------------------------------------------------------------------------------------

    def before_write(self, view: Tensor, overwrites: bool) -> Write | None:
        """Make the regions under ``view`` checkpoint-format memory, so that writing ``view`` is right.

        Args:
            view: plain view of the checkpoint name which is about to be written.
            overwrites: the write does not read what was there (``copy_``), so old bytes need not be kept.

        Returns what :meth:`after_write` or :meth:`undo` need. If this raises, nothing has changed.
        """
        name = self.kernel_name
        if name is not None and name.tensor._version != name.version:
            self.notice()
        if self.handed_out:
            self.need_memory()
        if self.is_plain:
            return None
        self.need_unexposed("write")
        regions, covers = covered(self.plan, self.core_bytes, view)
        write = Write(regions, covers, overwrites, [])
        if not overwrites:
            self._need_weights(view, regions)
        try:
            self._open(write)
        except BaseException:
            self.undo(write)
            raise
        return write

    def _open(self, write: Write) -> None:
        if self.holds_kernel_bytes:
            self._leave_kernel(write)
        if not (write.covers and write.overwrites):  # else regions move when all their bytes are there
            begun = [(r, s) for r in write.regions if (s := self.states[r]) is State.EMPTY or s is State.INVALID]
            if begun:
                write.moved.extend(begun)
                self._move([r for r, _ in begun], State.PARTIAL, "write")

    def _leave_kernel(self, write: Write) -> None:
        kept = not (write.covers and write.overwrites)
        for start, count, state in self.runs(write.regions):
            if state is not State.KERNEL:
                continue
            run = range(start, start + count)
            self._warn()  # before the kernel name's bytes change
            write.moved.extend((r, state) for r in run)
            if kept and (self.plan.transform.invertible or not write.overwrites):
                self.restore(run)
            else:  # nothing of the old bytes survives the write, or nothing can be said about them
                self._move(run, State.PARTIAL, "write")

    def undo(self, write: Write | None) -> None:
        """After a write that raised before it wrote: bring regions back to the state they were in."""
        if write is None:
            return
        for region, state in write.moved:
            if state is State.KERNEL and self.states[region] is State.CHECKPOINT:
                try:
                    self.to_kernel([region])
                except Exception:
                    continue  # restored is right too, only stale: the first error is the one to tell
            elif self.states[region] is State.PARTIAL:
                self._states.set_known([(region, state)])
        self._look()
        for listener in self.listeners:
            listener.settle_guard()

    def spoil(self, view: Tensor) -> None:
        """After a write that may have failed half-way: what is under ``view`` is neither old nor new."""
        self._why = "a write failed half-way"
        self._move(regions_of(self.plan, view), State.INVALID, "write")
        self._changed()

    def after_write(self, view: Tensor, write: Write | None = None) -> None:
        """Record that checkpoint values were written through ``view``."""
        if not self.is_plain:
            regions, covers = write[:2] if write is not None else covered(self.plan, self.core_bytes, view)
            if covers:
                self._move(regions, State.CHECKPOINT, "write")
            elif State.PARTIAL in self.states[regions.start : regions.stop]:
                self._written.add(view)
        self._changed()

    # -- writing from outside ------------------------------------------------------------------------------------------

    def expose(self, view: Tensor, writer: str) -> Write:
        """Make ``view`` checkpoint-format memory which ``writer`` may fill behind our back.

        Until :meth:`close_exposure` nothing reads, writes or converts this storage. Returns what :meth:`cancel_exposure` needs.
        """
        self.notice()
        self.need_unexposed("expose")
        regions, covers = covered(self.plan, self.core_bytes, view)
        if not covers and not self.plan.transform.invertible and any(self.states[r] is State.KERNEL for r in regions):
            self.read(view)  # raises: nobody could say what the bytes are that the writer leaves out
        write = Write(regions, False, True, [])  # as if it covered nothing: what the writer leaves out stays as it was
        try:
            self._open(write)
        except BaseException:
            self.undo(write)
            raise
        self.exposed = writer
        self._look()
        self._changed()
        return write

    def close_exposure(self, written: Iterable[Tensor], *, failed: Iterable[Tensor] = ()) -> None:
        """The writer is done with ``written`` (views of the checkpoint name); the regions under ``failed`` hold rubbish."""
        self.exposed = None
        self._look()
        for view in failed:
            self._why = "whoever wrote the raw bytes failed"
            self._move(regions_of(self.plan, view), State.INVALID, "abandon")
        for view in written:
            self.after_write(view)
        self._changed()

    def cancel_exposure(self, write: Write) -> None:
        """Nobody wrote: everything is as before :meth:`expose`."""
        self.exposed = None
        self._look()
        self.undo(write)

    # -- moving and copying ----------------------------------------------------------------------------------------------

    def relocate(self, device: torch.device) -> None:
        """Follow the module to another device: the one legal change of address, made by the owner."""
        if device == self.buffer.device:
            raise AssertionError(f"{self.label}: relocated to the device it is on")
        self.notice()
        with torch.inference_mode(False):
            self.name_buffer(self.buffer.to(device), has_kernel_name=self.kernel_name is not None)

    def __deepcopy__(self, memo: dict[int, Any]) -> AliasedStorage:
        self.need_unexposed("copy")
        self.notice()
        new = AliasedStorage.__new__(AliasedStorage)
        memo[id(self)] = new
        new.lock, new.listeners = threading.RLock(), []  # the copied registry connects itself
        for key, value in self.__dict__.items():
            if key not in _REMADE:
                new.__dict__[key] = value if key == "plan" else copy.deepcopy(value, memo)  # the plan is immutable
        with torch.inference_mode(False):
            new.buffer = copy.deepcopy(self.buffer, memo)
            new.checkpoint = name_over(new.buffer, new.plan, new.plan.source)
            new.kernel_name = None
            if self.kernel_name is not None:
                memory = name_over(new.buffer, new.plan, new.plan.derived)
                new.kernel_name = self.kernel_name.copied(memory, new, memo)
        return new

    def __getstate__(self) -> dict[str, Any]:
        self.need_unexposed("save")
        self.notice()
        # The registry listens to us and reconnects itself; the names are views made again from the buffer.
        state = {k: v for k, v in self.__dict__.items() if k not in _REMADE}
        # torch.save refuses one memory under two dtypes, and the kernel name is saved beside us as a buffer.
        state["buffer"] = self.buffer.view((self.kernel if self.kernel is not None else self.checkpoint).dtype)
        state["kernel_name"] = self.kernel_name
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.listeners = []
        self.lock = threading.RLock()
        self.buffer = self.buffer.view(torch.uint8)
        self.checkpoint = name_over(self.buffer, self.plan, self.plan.source)
        if self.kernel_name is not None:
            self.kernel_name.memory = name_over(self.buffer, self.plan, self.plan.derived)
            self.kernel_name.owner = self

    def __repr__(self) -> str:
        state = self.state.value if self.state else "mixed"
        return f"AliasedStorage({self.label!r}, {self.plan.source} -> {self.plan.derived}, {self.plan.nbytes} bytes, {state})"


#: Attributes which a copy makes for itself.
_REMADE = frozenset({"buffer", "checkpoint", "kernel_name", "listeners", "lock", "stand_in"})
