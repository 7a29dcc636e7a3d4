"""AliasedStorage: one allocation, several formats.

[Note: storage identity] From allocation on, the bytes may be rewritten but never moved: CUDA graphs and kernel objects hold
the address. Every name is a view of this one buffer. What a region's bytes mean is its state: see [Note: state] in _states.py.

[Note: threads] Loaders write shards from many threads. Whatever looks at a state and then touches bytes holds the storage's
lock, so a conversion never meets a write or a read of the same storage. Locks of several storages are taken in one order
(see :func:`all_locked`).
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import _convert
from ._kernel_name import KernelName
from ._reading import converted_copy, whose
from ._regions import covered, name_over, regions_of, regions_view
from ._states import RegionStates
from ._states import State as State
from ._transform import TensorSpec
from ._verdict import StoragePlan
from ._written import WrittenBytes
from .errors import MemoryFreedError, StateError


class Listener(Protocol):
    """Who shows kernel names that depend on a storage: a registry."""

    def mark_stale(self) -> None:
        """Something changed, or is about to."""

    def settle_guard(self) -> None:
        """What was about to change did not."""


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


class AliasedStorage:
    """A fixed buffer which knows, region by region, in which format its bytes are.

    Args:
        label: ``module.name`` for messages.
        plan: geometry of both formats.
        buffer: flat uint8 tensor of ``plan.nbytes`` bytes which this storage owns from now on.
        state: state of every region at the start.
        has_kernel_name: False for a checkpoint name which has no kernel format; it is never processed.
    """

    def __init__(
        self,
        label: str,
        plan: StoragePlan,
        buffer: Tensor,
        state: State = State.EMPTY,
        *,
        has_kernel_name: bool = True,
    ) -> None:
        if buffer.dtype != torch.uint8 or buffer.numel() != plan.nbytes:
            raise AssertionError(f"{label}: buffer of {buffer.numel()} {buffer.dtype}, planned {plan.nbytes} bytes")
        self.label = label
        self.plan = plan
        #: Counts content changes; whoever derives from this storage compares it with what it saw last.
        self.generation = 0
        #: Told of any change that makes a kernel name or a derivation stale; one per registry that shows this storage.
        self.listeners: list[Listener] = []
        #: See [Note: threads].
        self.lock = threading.RLock()
        #: Whether other code was given the raw storage, which it might free.
        self.handed_out = False
        #: Why somebody outside is writing the raw bytes now, or None.
        self.exposed: str | None = None
        self._states = RegionStates(plan.regions, state)
        self._written = WrittenBytes()
        self._why: str | None = None  # what made regions invalid, where that is not plain from the caller
        self.name_buffer(buffer, has_kernel_name=has_kernel_name and plan.reason.aliases)
        self._look()

    # -- names ---------------------------------------------------------------------------------------------------------

    def name_buffer(self, buffer: Tensor, *, has_kernel_name: bool) -> None:
        """Make the names over ``buffer``."""
        self.buffer = buffer
        with torch.inference_mode(False):
            self.checkpoint = name_over(buffer, self.plan, self.plan.source)
            self.kernel_name: KernelName | None = None
            if has_kernel_name:
                self.kernel_name = KernelName(self.label, name_over(buffer, self.plan, self.plan.derived), self)

    @property
    def kernel(self) -> Tensor | None:
        """The plain tensor that kernels read, or None. The library itself writes through a view of its own."""
        return None if self.kernel_name is None else self.kernel_name.tensor

    def kernel_regions(self, start: int, count: int) -> Tensor:
        if self.kernel_name is None:
            raise AssertionError(f"{self.label}: kernel state without a kernel name")
        return regions_view(self.plan, self.kernel_name.memory, start, count)

    # -- state ---------------------------------------------------------------------------------------------------------

    @cached_property
    def stand_in(self) -> torch.UntypedStorage:
        """What checkpoint names show as their raw storage while the bytes are not theirs: same size, no memory."""
        return torch.empty(self.plan.nbytes, dtype=torch.uint8, device="meta").untyped_storage()

    @property
    def states(self) -> list[State]:
        return self._states.each

    @property
    def state(self) -> State | None:
        """The common state of all regions, or None where they differ."""
        return self._states.common

    @property
    def holds_kernel_bytes(self) -> bool:
        """Whether any region is in kernel format, so that a write or a conversion may change its bytes' format."""
        return self._states.any_is(State.KERNEL)

    @property
    def is_current(self) -> bool:
        """Whether every region is in kernel format, and other code left the kernel name alone."""
        name = self.kernel_name
        return self._states.all_are(State.KERNEL) and name is not None and not name.was_written and not name.was_moved

    def _move(self, regions: Sequence[int], to: State, doing: str) -> None:
        self.need_unexposed(doing)
        # What arrived before a region is begun again, or becomes invalid, no longer counts.
        begun = [r for r in regions if self.states[r] is not State.PARTIAL] if to is State.PARTIAL else ()
        self._states.move(regions, to, doing, self.label)
        for region in regions if to is State.INVALID else begun:
            self._written.forget(region * self.plan.region_capacity, (region + 1) * self.plan.region_capacity)
        self._look()

    def _look(self) -> None:
        """Renew what follows from the states."""
        #: Fast path: every region is CHECKPOINT and nobody outside writes, so checkpoint names are plain memory.
        self.is_plain = self._states.all_are(State.CHECKPOINT) and self.exposed is None
        if self.is_plain:
            self._written.clear()
            self._why = None

    def invalidate(self, why: str | None = None) -> None:
        """Declare the bytes unusable (failed load, sleep). Only a whole rewrite leads out."""
        self._move(range(self.plan.regions), State.INVALID, "invalidate")
        self._written.clear()
        self._why = why
        self._changed()

    def notice(self) -> None:
        """See whether other code wrote the kernel name: then nobody knows what the bytes are. See [Note: foreign writes]."""
        self.need_memory()
        name = self.kernel_name
        if name is not None and name.tensor._version != name.version and self.exposed is None:
            name.accept()
            self.invalidate(
                f"the kernel name {name.label.rpartition('.')[2]!r} was written by other code: only aliasparam.process() writes "
                "kernel names, and DistributedDataParallel, averaged models and the like must leave such buffers out"
            )

    def _changed(self) -> None:
        self.generation += 1
        self._warn()

    def _warn(self) -> None:
        for listener in self.listeners:
            listener.mark_stale()

    def need_unexposed(self, doing: str) -> None:
        """Raise StateError while somebody outside writes the raw bytes."""
        if self.exposed is not None:
            raise StateError(
                f"cannot {doing}: the raw bytes are exposed to {self.exposed}",
                label=self.label,
                expected="written() or abandon() of the exposure first",
                found="an open exposure",
                remedy="Close it, or leave its `with` block; a bulk load ends with its block.",
            )

    def need_memory(self) -> None:
        """Raise MemoryFreedError where other code gave the memory back (``untyped_storage().resize_(0)``)."""
        if self.buffer.device.type != "meta" and self.buffer.untyped_storage().nbytes() < self.plan.nbytes:
            raise MemoryFreedError(
                "the memory of this name was freed",
                label=self.label,
                expected=f"{self.plan.nbytes} bytes",
                found=f"{self.buffer.untyped_storage().nbytes()} bytes",
                remedy="Call aliasparam.invalidate(model) before memory is lent out, have it back at the same address, and load again.",
            )

    # -- reading -------------------------------------------------------------------------------------------------------

    def read(self, view: Tensor) -> Tensor:
        """Checkpoint values of ``view`` (a plain view of the checkpoint name): the view itself where the memory holds them,
        else a converted copy of the same shape, strides and dtype.

        Raises:
            StateError: bytes that were never written, are invalid, or hold kernel bytes without an inverse.
        """
        name = self.kernel_name
        if name is not None and name.tensor._version != name.version:
            self.notice()
        if self.handed_out:
            self.need_memory()
        if self.is_plain:
            return view
        self.need_unexposed("read")
        regions = regions_of(self.plan, view)
        self._need_weights(view, regions)
        if any(self.states[r] is State.KERNEL for r in regions):
            return converted_copy(self, view, regions)
        return view

    def holds(self, view: Tensor) -> bool:
        """Whether the memory under ``view`` holds its values, so that :meth:`read` would give the view itself."""
        if self.is_plain or self.exposed is not None:
            return self.is_plain
        regions = regions_of(self.plan, view)
        found = {self.states[r] for r in regions}
        return found <= {State.CHECKPOINT, State.PARTIAL} and self._has_weights(view, found)

    def _has_weights(self, view: Tensor, found: set[State]) -> bool:
        if State.EMPTY in found or State.INVALID in found:
            return False
        if State.PARTIAL not in found:
            return True
        size = self.plan.region_capacity
        loaded = [(r * size, (r + 1) * size) for r, state in enumerate(self.states) if state is not State.PARTIAL]
        return self._written.has(view, self.plan.nbytes, loaded)

    def _need_weights(self, view: Tensor, regions: range) -> None:
        """Refuse to read bytes that were never loaded."""
        if not self._has_weights(view, {self.states[r] for r in regions}):
            bad = next(r for r in regions if self.states[r] not in (State.CHECKPOINT, State.KERNEL))
            raise self._not_loaded("reading bytes that hold no weights", bad)

    def _not_loaded(self, doing: str, region: int) -> StateError:
        state = self.states[region].value
        return StateError(
            f"{doing}: region {region} of {self.plan.regions} is {state!r}",
            label=self.label,
            expected="checkpoint-format bytes in the whole tensor",
            found=f"{state}: {self._why}" if self._why else state,
            remedy="Load every shard of this tensor first.",
        )

    def runs(self, regions: Iterable[int]) -> list[tuple[int, int, State]]:
        """(first, count, state) runs of equal state, each small enough for the scratch bound."""
        most, states = _convert.regions_at_once(self.plan), self.states
        found: list[tuple[int, int, State]] = []
        for region in regions:
            if found:
                start, count, state = found[-1]
                if region == start + count and count < most and states[region] is state:
                    found[-1] = (start, count + 1, state)
                    continue
            found.append((region, 1, states[region]))
        return found

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
        regions, covers = covered(self.plan, view)
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
            begun = [r for r in write.regions if self.states[r] is State.EMPTY or self.states[r] is State.INVALID]
            if begun:
                write.moved.extend((r, self.states[r]) for r in begun)
                self._move(begun, State.PARTIAL, "write")

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
            regions, covers = write[:2] if write is not None else covered(self.plan, view)
            if covers:
                self._move(regions, State.CHECKPOINT, "write")
            elif self._states.any_is(State.PARTIAL) and any(self.states[r] is State.PARTIAL for r in regions):
                self._written.add(view)
        self._changed()

    def settle(self) -> None:
        """Turn PARTIAL regions whose bytes have all arrived into CHECKPOINT."""
        if not self._states.any_is(State.PARTIAL):
            return
        mask = self._written.mask(self.plan.nbytes)
        core_bytes = self.plan.source.nbytes // self.plan.regions
        partial = [r for r, s in enumerate(self.states) if s is State.PARTIAL]
        full = [r for r in partial if bool(mask[r * self.plan.region_capacity :][:core_bytes].all())]
        self._move(full, State.CHECKPOINT, "settle")

    # -- writing from outside ------------------------------------------------------------------------------------------

    def expose(self, view: Tensor, writer: str) -> Write:
        """Make ``view`` checkpoint-format memory which ``writer`` may fill behind our back.

        Until :meth:`close_exposure` nothing reads, writes or converts this storage. Returns what :meth:`cancel_exposure` needs.
        """
        self.notice()
        self.need_unexposed("expose")
        regions, covers = covered(self.plan, view)
        if not self.plan.transform.invertible and not covers:
            if any(self.states[r] is State.KERNEL for r in regions):
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

    # -- converting ----------------------------------------------------------------------------------------------------

    def to_kernel(self, regions: Iterable[int] | None = None) -> int:
        """Bring regions (default: all) to kernel format in place; returns how many were converted.

        Raises:
            StateError: a region is empty, partly written or invalid. Nothing is converted then.
        """
        self.notice()
        self.settle()
        wanted = range(self.plan.regions) if regions is None else list(regions)
        self.need_loaded(wanted)
        stale = [r for r in wanted if self.states[r] is not State.KERNEL]
        if self.kernel_name is None or not stale:
            return 0
        self.need_unexposed("process")
        for start, count, _ in self.runs(stale):
            with self._converting(range(start, start + count), State.KERNEL, "process") as progress:
                checkpoint = regions_view(self.plan, self.checkpoint, start, count)
                _convert.to_kernel(self.plan, checkpoint, self.kernel_regions(start, count), progress)
        return len(stale)

    def need_loaded(self, regions: Iterable[int] | None = None) -> None:
        """Raise StateError where a region (default: any) is empty, partly written or invalid."""
        for region in range(self.plan.regions) if regions is None else regions:
            if self.states[region] not in (State.CHECKPOINT, State.KERNEL):
                raise self._not_loaded("cannot process", region)

    def restore(self, regions: Iterable[int] | None = None) -> None:
        """Bring regions (default: all) back to checkpoint format in place."""
        self.notice()
        if self.is_plain:
            return
        wanted = range(self.plan.regions) if regions is None else regions
        for start, count, state in self.runs(wanted):
            if state is State.KERNEL:
                self.need_unexposed("restore")
                with whose(self), self._converting(range(start, start + count), State.CHECKPOINT, "restore") as progress:
                    checkpoint = regions_view(self.plan, self.checkpoint, start, count)
                    _convert.to_checkpoint(self.plan, checkpoint, self.kernel_regions(start, count), progress)

    @contextmanager
    def _converting(self, run: range, to: State, doing: str) -> Iterator[_convert.Progress]:
        """Move ``run`` to ``to`` at the end; if it fails after the first byte changed, the run holds both formats."""
        progress = _convert.Progress()
        try:
            yield progress
            self._move(run, to, doing)
        except BaseException:
            if progress.wrote:
                self._why = "a conversion failed half-way"
                self._move(run, State.INVALID, doing)
                self._changed()
            raise

    def put_kernel(self, value: Tensor) -> None:
        """Write kernel-format bytes made elsewhere (the ported helpers) over the whole storage."""
        if self.kernel_name is None or TensorSpec.of(value) != self.plan.derived:
            raise AssertionError(f"{self.label}: {TensorSpec.of(value)} is not the kernel format {self.plan.derived}")
        self.need_unexposed("process")
        self.kernel_name.memory.copy_(value)
        self.kernel_name.accept()
        self._states.set_known((r, State.KERNEL) for r in range(self.plan.regions))
        self._written.clear()
        self._look()

    def retarget(self, plan: StoragePlan) -> None:
        """Change to another kernel format of the same capacity. The bytes must be in checkpoint format, or not loaded."""
        if self.kernel_name is None or (plan.regions, plan.region_capacity) != (self.plan.regions, self.plan.region_capacity):
            raise AssertionError(f"{self.label}: {plan} does not fit {self.plan}")
        if self.holds_kernel_bytes:
            raise AssertionError(f"{self.label}: retargeted before it was restored")
        self.plan = plan
        label = self.kernel_name.label
        self.name_buffer(self.buffer, has_kernel_name=True)
        self.kernel_name.label = label
        self._changed()

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
