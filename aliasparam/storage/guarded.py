"""What may be done to the memory of a storage, who is told before it changes, and what other code does to it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import MemoryFreedError, StateError
from ..layout import BoundLayout
from ..layout.boxes import shown
from ..torch_private import stand_ins
from .kernel_name import KernelName
from .locks import LOCKS, lock_number
from .states import RegionStates, State


class Listener(Protocol):
    """A registry that shows a storage's kernel name or derives from it. ``is_undeclared``: undeclared code makes kernel bytes of
    this storage for it."""

    @property
    def is_open(self) -> bool: ...
    def open(self) -> None: ...
    def is_undeclared(self, storage: Any) -> bool: ...


class GuardedMemory:
    """A buffer with the state of every region, a lock, a version, and whoever must know before its bytes change."""

    label: str
    bound: BoundLayout
    buffer: Tensor
    elements: Tensor  #: Of the checkpoint's dtype, flat, with a version counter of its own: a write is none to the geometry.
    _address: int
    states: RegionStates
    kernel_name: KernelName | None

    def __init__(self) -> None:
        self.version = 0  #: Counts changes of content; whoever derives from this storage compares it with what it saw last.
        #: Who outside writes the raw bytes (an exposure in kernel order), and what it is called.
        self._writer: tuple[weakref.ref[object], str] | None = None
        self._due: str | None = None  # see invalidate_later()
        self._listeners: list[weakref.ref[Listener]] = []
        self.lock_number = lock_number()

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """See [Note: locks]."""
        return LOCKS[self.lock_number]

    @property
    def state(self) -> State | None:
        """The common state of all regions, or None where they differ."""
        self.invalidate_if_due()
        return self.states.common

    @property
    def kernel_state(self) -> State:
        """What regions are whose kernel bytes are whole and right."""
        return State.FOREIGN if any(one.is_undeclared(self) for one in self.listeners) else State.LOADED

    # -- before bytes change -------------------------------------------------------------------------------------------

    def before_write(self) -> None:
        """Refuse, or tell whoever must know; no byte has changed yet. The caller holds the lock."""
        self.need_writable()
        self.changing()

    def need_writable(self) -> None:
        """Raise StateError or MemoryFreedError where the bytes are not the library's to write. The caller holds the lock."""
        if stand_ins() is not None:
            raise self.among_stand_ins("a write among stand-ins for tensors lands nowhere")
        self._look_at_memory()
        if self._writer is not None:
            self.need_unexposed("write")

    def among_stand_ins(self, what: str) -> StateError:
        return StateError(
            what,
            label=self.label,
            expected="a real tensor",
            found="an active FakeTensorMode",
            remedy="Do it outside of the mode; a module on the meta device has names without memory too.",
        )

    def changing(self) -> None:
        """Bytes are about to change. An interrupt after this leaves a version that nobody has derived from."""
        self.tell()
        self.version += 1

    def clear_unknown(self, regions: Sequence[int]) -> None:
        """Padding of regions that are INVALID may be whatever other code left (memory that was lent, a write past the library):
        it is zero again, before what has arrived is counted anew."""
        size = self.bound.region_capacity
        if size == self.bound.region_elements:
            return
        for region in regions:
            if self.states.of(region) is State.INVALID:
                self.elements[region * size : (region + 1) * size].view(torch.uint8).zero_()

    def tell(self) -> None:
        """What shows a kernel name of this storage or derives from it refuses from now on, until it is processed."""
        for reference in self._listeners:
            listener = reference()
            if listener is not None and not listener.is_open:
                listener.open()

    @property
    def listeners(self) -> list[Listener]:
        """Whoever :meth:`tell` tells and still is."""
        return [found for reference in self._listeners if (found := reference()) is not None]

    def listen(self, listener: Listener) -> None:
        """Tell ``listener``, which is held weakly, once each time."""
        self._listeners = [weakref.ref(known) for known in self.listeners if known is not listener] + [weakref.ref(listener)]

    def invalidate(self, why: str | None = None) -> None:
        """Nobody knows what the bytes are (failed load, sleep). Only a whole rewrite leads out."""
        with LOCKS[self.lock_number]:
            self.changing()
            self.states.put_all(State.INVALID, why)
            self.unexpose()
            self._due = None

    def invalidate_later(self, why: str) -> None:
        """:meth:`invalidate`, at the next look at this memory: for finalizers, which the garbage collector calls at any line of
        any thread. That may hold any lock, so they take none."""
        self._due = why

    def invalidate_if_due(self) -> None:
        """Carry out what :meth:`invalidate_later` left."""
        if self._due is not None:
            with LOCKS[self.lock_number]:
                if self._due is not None:  # not yet by who had the lock, and wrote the memory since
                    self.invalidate(self._due)

    # -- what other code does to the memory ----------------------------------------------------------------------------

    @property
    def exposed(self) -> str | None:
        """Who outside is writing the raw bytes now, or None. One that was dropped without an end has left rubbish."""
        if self._writer is None:
            return None
        writer, name = self._writer
        if writer() is None:
            self.states.put_all(State.INVALID, "whoever wrote the raw bytes was dropped without an end")
            self.unexpose()
            return None
        return name

    def expose(self, writer: object, name: str) -> None:
        """Let ``writer``, called ``name``, write the raw bytes: until :meth:`unexpose` nothing else reads or writes them."""
        with LOCKS[self.lock_number]:
            self.need_unexposed("expose")
            self.before_write()
            self._writer = weakref.ref(writer), name

    def is_exposed_to(self, writer: object) -> bool:
        return self._writer is not None and self._writer[0]() is writer

    def unexpose(self) -> None:
        self._writer = None

    def _look_at_memory(self) -> None:
        if self._due is not None:
            self.invalidate_if_due()
        if self.kernel_name is not None and self.kernel_name.was_written:
            self.notice()
        if self.buffer.data_ptr() != self._address:  # freed, or given other memory
            self.need_memory()

    def notice(self) -> None:
        """See whether other code wrote the kernel name. See [Note: foreign writes] in kernel_name.py."""
        self.invalidate_if_due()
        name = self.kernel_name
        if name is not None and name.was_written and self.exposed is None:
            self.invalidate(
                f"the kernel name {name.label.rpartition('.')[2]!r} was written by other code: only aliasparam.process() writes "
                "kernel names, and DistributedDataParallel, averaged models and the like must leave such buffers out"
            )
            name.accept()

    def need_memory(self) -> None:
        """Raise MemoryFreedError where other code gave the memory back (``untyped_storage().resize_(0)``)."""
        held = self.buffer.untyped_storage().nbytes()
        if held < self.buffer.numel() and self.buffer.device.type != "meta":
            raise MemoryFreedError(
                "the memory of this name was freed",
                label=self.label,
                expected=f"{self.buffer.numel()} bytes",
                found=f"{held} bytes",
                remedy="Call aliasparam.invalidate(model) before memory is lent; have it back at its address, and load again.",
            )

    def need_unexposed(self, doing: str) -> None:
        """Raise StateError while somebody outside writes the raw bytes."""
        if (writer := self.exposed) is not None:
            raise StateError(
                f"cannot {doing}: the raw bytes are exposed to {writer}",
                label=self.label,
                expected="written() or abandon() of the exposure first",
                found="an open exposure",
                remedy="Close it, or leave its `with` block.",
            )

    def not_loaded(self, doing: str, region: int | None = None) -> StateError:
        """What to raise where a region (default: the first) lacks elements."""
        states = self.states
        region = min(states.missing) if region is None else region
        state, count = states.of(region), states.count
        missing = ", ".join(map(shown, states.missing_boxes(region)[:3])) if state is State.PARTIAL else ""
        what = f"{state.value}: {states.why}" if states.why and state is State.INVALID else state.value
        return StateError(
            f"{doing}: region {region} of {count} is {state.value!r}" if count > 1 else f"{doing}: it is {state.value!r}",
            label=self.label,
            expected="every element of the tensor written",
            found=f"{what}, without {missing}" if missing else what,
            remedy="Load every shard of this tensor first.",
        )
