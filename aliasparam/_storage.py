"""AliasedStorage: one allocation, several formats, and the only place where its state changes.

[Note: storage identity] From allocation on, the bytes may be rewritten but never moved: CUDA graphs and kernel objects hold
the address. Every name is a view of this one buffer.

[Note: state] Each region is in one state, and its bytes mean nothing without it:

    EMPTY ──write──▶ PARTIAL ──all bytes written──▶ CHECKPOINT ──process──▶ KERNEL
                        ▲                              ▲ │                    │
                        └──── write ──── INVALID       │ └──── fail ──▶ …     │
                                                       └──── write, restore ──┘

    EMPTY       allocated, never written          names refuse to be read
    PARTIAL     some checkpoint bytes written     only what was written can be read
    CHECKPOINT  checkpoint-format bytes           checkpoint names are plain memory; kernel names are stale
    KERNEL      kernel-format bytes               kernel names are plain memory; checkpoint names read a converted copy
    INVALID     a failed load or sleep            everything refuses until it is written whole again

[Note: threads] Loaders write shards from many threads. Whatever looks at a state and then touches bytes holds the storage's
lock, so a conversion never meets a write or a read of the same storage. Locks of several storages are taken in one order
(see :func:`all_locked`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from . import _convert
from ._transform import TensorSpec, contiguous_strides
from ._verdict import StoragePlan
from ._written import WrittenBytes
from .errors import PointerError, StateError


class State(Enum):
    EMPTY = "empty"
    PARTIAL = "partly written"
    CHECKPOINT = "checkpoint format"
    KERNEL = "kernel format"
    INVALID = "invalid"


#: The legal moves; `_move` is their only executor.
_MOVES: dict[State, frozenset[State]] = {
    State.EMPTY: frozenset({State.PARTIAL, State.CHECKPOINT, State.INVALID}),
    State.PARTIAL: frozenset({State.PARTIAL, State.CHECKPOINT, State.KERNEL, State.INVALID}),
    State.CHECKPOINT: frozenset({State.CHECKPOINT, State.KERNEL, State.INVALID}),
    State.KERNEL: frozenset({State.KERNEL, State.CHECKPOINT, State.PARTIAL, State.INVALID}),
    State.INVALID: frozenset({State.PARTIAL, State.CHECKPOINT, State.INVALID}),
}


@contextmanager
def all_locked(storages: Iterable[AliasedStorage]) -> Iterator[None]:
    """Hold several locks, taken in one order by everybody, so that no two wait for each other. See [Note: threads]."""
    with ExitStack() as locks:
        for storage in sorted(storages, key=id):
            locks.enter_context(storage.lock)
        yield


#: Attributes which an unpickled storage makes for itself.
_REMADE = frozenset({"checkpoint", "kernel", "listeners", "lock", "stand_in"})


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
        self.buffer = buffer
        self.states = [state] * plan.regions
        #: Counts content changes; whoever derives from this storage compares it with what it saw last.
        self.generation = 0
        #: Called after any change that makes a kernel name or a derivation stale; one per registry that shows this storage.
        self.listeners: list[Callable[[], None]] = []
        #: See [Note: threads].
        self.lock = threading.RLock()
        #: Why somebody outside is writing the raw bytes now, or None.
        self.exposed: str | None = None
        self._written = WrittenBytes()
        self._plain = state is State.CHECKPOINT  # fast path: every region is CHECKPOINT
        self.checkpoint = self._name(plan.source)
        self.kernel = self._name(plan.derived) if has_kernel_name and plan.reason.aliases else None

    # -- names ---------------------------------------------------------------------------------------------------------

    def _name(self, spec: TensorSpec) -> Tensor:
        """The plain tensor of one format over the buffer. See [Note: regions lie apart] in _verdict.py."""
        lead = self.plan.lead_dims
        strides = contiguous_strides(spec.shape)
        step = self.plan.region_capacity // spec.dtype.itemsize
        for dim in reversed(range(lead)):
            strides[dim] = step
            step *= spec.shape[dim]
        return self.buffer.view(spec.dtype).as_strided(spec.shape, strides)

    def _regions_view(self, name: Tensor, first: int, count: int) -> Tensor:
        """``count`` regions of one name as [count, *core]."""
        lead = self.plan.lead_dims
        step = self.plan.region_capacity // name.element_size()
        return name.as_strided((count, *name.shape[lead:]), (step, *name.stride()[lead:]), first * step)

    def regions_of(self, view: Tensor) -> range:
        """The regions which a view of the checkpoint name touches."""
        if self.plan.regions == 1:
            return range(1)
        if view.numel() == 0:
            return range(0)
        width, capacity = view.element_size(), self.plan.region_capacity
        first = view.storage_offset() * width
        last = first + sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True)) * width
        return range(first // capacity, last // capacity + 1)

    # -- state ---------------------------------------------------------------------------------------------------------

    @cached_property
    def stand_in(self) -> torch.UntypedStorage:
        """What checkpoint names show as their raw storage while the bytes are not theirs: same size, no memory."""
        return torch.empty(self.plan.nbytes, dtype=torch.uint8, device="meta").untyped_storage()

    @property
    def state(self) -> State | None:
        """The common state of all regions, or None where they differ."""
        first = self.states[0] if self.states else State.CHECKPOINT
        return first if all(s is first for s in self.states) else None

    def _move(self, regions: Iterable[int], to: State, doing: str) -> None:
        """Change state: the only place. Refuses illegal moves before any is made."""
        regions = list(regions)
        self._need_unexposed(doing)
        for region in regions:
            if to not in _MOVES[self.states[region]]:
                raise StateError(
                    f"cannot {doing}: region {region} is {self.states[region].value!r}",
                    name=self.label,
                    expected=f"a state from which {to.value!r} can be reached",
                    found=self.states[region].value,
                    remedy="Load the whole tensor first." if to is not State.CHECKPOINT else None,
                )
        for region in regions:
            self.states[region] = to
        self._plain = all(s is State.CHECKPOINT for s in self.states)
        if self._plain:
            self._written.clear()

    def invalidate(self) -> None:
        """Declare the bytes unusable (failed load, sleep). Only a whole rewrite leads out."""
        self._move(range(self.plan.regions), State.INVALID, "invalidate")
        self._written.clear()
        self._changed()

    def _changed(self) -> None:
        self.generation += 1
        for listener in self.listeners:
            listener()

    def _need_unexposed(self, doing: str) -> None:
        if self.exposed is not None:
            raise StateError(
                f"cannot {doing}: the raw bytes are exposed to {self.exposed}",
                name=self.label,
                expected="written() or abandon() of the exposure first",
                found="an open exposure",
            )

    # -- reading -------------------------------------------------------------------------------------------------------

    def read(self, view: Tensor) -> Tensor:
        """Checkpoint values of ``view`` (a plain view of the checkpoint name): the view itself where the memory holds them,
        else a converted copy of the same shape, strides and dtype.

        Raises:
            StateError: bytes that were never written, are invalid, or hold kernel bytes without an inverse.
        """
        if self._plain:
            return view
        self._need_unexposed("read")
        regions = self.regions_of(view)
        self._need_weights(view, regions)
        if any(self.states[r] is State.KERNEL for r in regions):
            return self._converted(view, regions)
        return view

    def _need_weights(self, view: Tensor, regions: range) -> None:
        """Refuse to read bytes that were never loaded."""
        found = {self.states[r] for r in regions}
        if found & {State.EMPTY, State.INVALID} or (State.PARTIAL in found and not self._written.has(view, self.plan.nbytes)):
            bad = next(r for r in regions if self.states[r] not in (State.CHECKPOINT, State.KERNEL))
            raise StateError(
                f"reading bytes that hold no weights: region {bad} of {self.plan.regions} is {self.states[bad].value!r}",
                name=self.label,
                expected="a loaded tensor",
                found=self.states[bad].value,
                remedy="Load checkpoint-format bytes into the whole tensor first.",
            )

    def _converted(self, view: Tensor, regions: range) -> Tensor:
        first, count, capacity = regions[0], len(regions), self.plan.region_capacity
        temporary = torch.empty(count * capacity, dtype=torch.uint8, device=self.buffer.device)
        spec = self.plan.source
        core = spec.shape[self.plan.lead_dims :]
        typed = temporary.view(spec.dtype).as_strided(
            (count, *core), (capacity // spec.dtype.itemsize, *contiguous_strides(core))
        )
        for start, n, state in self._runs(regions):
            target = typed[start - first : start - first + n]
            if state is State.KERNEL:
                target.copy_(self._inverse(start, n))
            else:
                target.copy_(self._regions_view(self.checkpoint, start, n))
        offset = view.storage_offset() - first * capacity // view.element_size()
        result = torch.empty(0, dtype=view.dtype, device=view.device)
        return result.set_(temporary.untyped_storage(), offset, view.shape, view.stride())

    def _inverse(self, start: int, count: int) -> Tensor:
        kernel = self._kernel_regions(start, count)
        core = self.plan.source.shape[self.plan.lead_dims :]
        with self._telling_whose():
            return self.plan.transform.inverse(kernel, TensorSpec((count, *core), self.plan.source.dtype))

    def _kernel_regions(self, start: int, count: int) -> Tensor:
        if self.kernel is None:
            raise AssertionError(f"{self.label}: kernel state without a kernel name")
        return self._regions_view(self.kernel, start, count)

    @contextmanager
    def _telling_whose(self) -> Iterator[None]:
        """A transform without an inverse does not know whose bytes it refuses; we do."""
        try:
            yield
        except StateError as error:
            facts = {"expected": error.expected, "found": error.found, "remedy": error.remedy}
            raise StateError(error.message, name=self.label, **facts) from None

    def _runs(self, regions: Iterable[int]) -> Iterable[tuple[int, int, State]]:
        """(first, count, state) runs of equal state, each small enough for the scratch bound."""
        most = _convert.regions_at_once(self.plan)
        start, count = -1, 0
        for region in regions:
            if count and region == start + count and count < most and self.states[region] is self.states[start]:
                count += 1
                continue
            if count:
                yield start, count, self.states[start]
            start, count = region, 1
        if count:
            yield start, count, self.states[start]

    # -- writing -------------------------------------------------------------------------------------------------------

    def before_write(self, view: Tensor, overwrites: bool) -> list[tuple[int, State]]:
        """Make the regions under ``view`` checkpoint-format memory, so that writing ``view`` is right.

        Args:
            view: plain view of the checkpoint name which is about to be written.
            overwrites: the write does not read what was there (``copy_``), so old bytes need not be kept.

        Returns what :meth:`undo` needs if the write then fails.
        """
        if self._plain:
            return []
        self._need_unexposed("write")
        undo: list[tuple[int, State]] = []
        regions = self.regions_of(view)
        if not overwrites:
            self._need_weights(view, regions)
        whole = overwrites and self._covers(view, regions)
        for start, count, state in list(self._runs(regions)):
            run = range(start, start + count)
            if state is State.KERNEL:
                undo.extend((r, state) for r in run)
                self._leave_kernel(run, whole, overwrites)
            elif state in (State.EMPTY, State.INVALID):
                undo.extend((r, state) for r in run)
                self._move(run, State.PARTIAL, "write")
        return undo

    def _leave_kernel(self, run: range, whole: bool, overwrites: bool) -> None:
        if not whole and (self.plan.transform.invertible or not overwrites):
            self.restore(run)
        else:  # nothing of the old bytes survives the write, or nothing can be said about them
            self._move(run, State.PARTIAL, "write")

    def undo(self, changes: list[tuple[int, State]]) -> None:
        """After a write that raised before it wrote: bring regions back to the state they were in."""
        for region, state in changes:
            if state is State.KERNEL and self.states[region] is State.CHECKPOINT:
                self.to_kernel([region])
            else:
                self.states[region] = state
        self._plain = all(s is State.CHECKPOINT for s in self.states)

    def after_write(self, view: Tensor) -> None:
        """Record that checkpoint values were written through ``view``."""
        if not self._plain:
            regions = self.regions_of(view)
            open_regions = [r for r in regions if self.states[r] is State.PARTIAL]
            if open_regions and self._covers(view, regions):
                self._move(open_regions, State.CHECKPOINT, "write")
            elif open_regions:
                self._written.add(view)
        self._changed()

    def _covers(self, view: Tensor, regions: range) -> bool:
        """Whether ``view`` holds every checkpoint byte of ``regions`` (a view never lists a byte twice: see as_strided)."""
        per_region = self.plan.source.nbytes // max(self.plan.regions, 1)
        return view.numel() * view.element_size() == per_region * len(regions) and 0 not in view.stride()

    def settle(self) -> None:
        """Turn PARTIAL regions whose bytes have all arrived into CHECKPOINT."""
        partial = [r for r, s in enumerate(self.states) if s is State.PARTIAL]
        if not partial:
            return
        mask = self._written.mask(self.plan.nbytes)
        core_bytes = self.plan.source.nbytes // self.plan.regions
        full = [r for r in partial if bool(mask[r * self.plan.region_capacity :][:core_bytes].all())]
        self._move(full, State.CHECKPOINT, "settle")

    # -- writing from outside ------------------------------------------------------------------------------------------

    def expose(self, view: Tensor, writer: str) -> None:
        """Make ``view`` checkpoint-format memory which ``writer`` may fill behind our back.

        Until :meth:`close_exposure` nothing reads, writes or converts this storage.
        """
        self._need_unexposed("expose")
        if self.plan.transform.invertible:  # what the writer leaves out stays as it was
            self.restore(self.regions_of(view))
        self.before_write(view, overwrites=True)
        self.exposed, self._plain = writer, False
        self._changed()

    def close_exposure(self, written: Iterable[Tensor], *, failed: Iterable[Tensor] = ()) -> None:
        """The writer is done with ``written`` (views of the checkpoint name); the regions under ``failed`` hold rubbish."""
        self.exposed = None
        for view in failed:
            self._move(self.regions_of(view), State.INVALID, "abandon")
        self._plain = all(s is State.CHECKPOINT for s in self.states)
        for view in written:
            self.after_write(view)
        self._changed()

    # -- converting ----------------------------------------------------------------------------------------------------

    def to_kernel(self, regions: Iterable[int] | None = None) -> int:
        """Bring regions (default: all) to kernel format in place; returns how many were converted.

        Raises:
            StateError: a region is empty, partly written or invalid. Nothing is converted then.
        """
        self.settle()
        wanted = range(self.plan.regions) if regions is None else list(regions)
        self.need_loaded(wanted)
        stale = [r for r in wanted if self.states[r] is not State.KERNEL]
        if self.kernel is None or not stale:
            return 0
        self._need_unexposed("process")
        for start, count, _ in list(self._runs(stale)):
            checkpoint = self._regions_view(self.checkpoint, start, count)
            _convert.to_kernel(self.plan, checkpoint, self._kernel_regions(start, count))
            self._move(range(start, start + count), State.KERNEL, "process")
        return len(stale)

    def need_loaded(self, regions: Iterable[int] | None = None) -> None:
        """Raise StateError where a region (default: any) is empty, partly written or invalid."""
        for region in range(self.plan.regions) if regions is None else regions:
            if self.states[region] not in (State.CHECKPOINT, State.KERNEL):
                raise StateError(
                    f"cannot process: region {region} of {self.plan.regions} is {self.states[region].value!r}",
                    name=self.label,
                    expected="checkpoint-format bytes in the whole tensor",
                    found=self.states[region].value,
                    remedy="Load every shard of this tensor before processing.",
                )

    def restore(self, regions: Iterable[int] | None = None) -> None:
        """Bring regions (default: all) back to checkpoint format in place."""
        if self._plain:
            return
        wanted = range(self.plan.regions) if regions is None else regions
        for start, count, state in list(self._runs(wanted)):
            if state is State.KERNEL:
                self._need_unexposed("restore")
                with self._telling_whose():
                    checkpoint = self._regions_view(self.checkpoint, start, count)
                    _convert.to_checkpoint(self.plan, checkpoint, self._kernel_regions(start, count))
                self._move(range(start, start + count), State.CHECKPOINT, "restore")

    def put_kernel(self, value: Tensor) -> None:
        """Write kernel-format bytes made elsewhere (the ported helpers) over the whole storage."""
        if self.kernel is None or TensorSpec.of(value) != self.plan.derived:
            raise AssertionError(f"{self.label}: {TensorSpec.of(value)} is not the kernel format {self.plan.derived}")
        self._need_unexposed("process")
        self.kernel.copy_(value)
        for region in range(self.plan.regions):
            self.states[region] = State.KERNEL
        self._plain = False
        self._written.clear()

    def retarget(self, plan: StoragePlan) -> None:
        """Change to another kernel format of the same capacity. The bytes go back to checkpoint format first."""
        if self.kernel is None or (plan.regions, plan.region_capacity) != (self.plan.regions, self.plan.region_capacity):
            raise AssertionError(f"{self.label}: {plan} does not fit {self.plan}")
        self.restore()
        self.plan = plan
        self.kernel = self._name(self.plan.derived)
        self._changed()

    def relocate(self, device: torch.device) -> None:
        """Follow the module to another device: the one legal change of address, made by the owner."""
        if device == self.buffer.device:
            raise PointerError("relocating to the device it is on", name=self.label)
        self.buffer = self.buffer.to(device)
        self.checkpoint = self._name(self.plan.source)
        self.kernel = self._name(self.plan.derived) if self.kernel is not None else None

    # -- copying -------------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> AliasedStorage:
        import copy

        new = AliasedStorage.__new__(AliasedStorage)
        memo[id(self)] = new
        new.lock, new.listeners = threading.RLock(), []  # the copied registry connects itself
        for key, value in self.__dict__.items():
            # The plan is immutable. Tensors over one memory stay over one memory: torch keeps that in the memo.
            if key not in ("lock", "listeners", "stand_in"):
                new.__dict__[key] = value if key == "plan" else copy.deepcopy(value, memo)
        return new

    def __getstate__(self) -> dict[str, Any]:
        # The registry listens to us and reconnects itself; the names are views made again from the buffer.
        state = {k: v for k, v in self.__dict__.items() if k not in _REMADE}
        # torch.save refuses one memory under two dtypes, and the kernel name is saved beside us as a buffer.
        state["buffer"] = self.buffer.view((self.kernel if self.kernel is not None else self.checkpoint).dtype)
        state["has_kernel_name"] = self.kernel is not None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        has_kernel_name = state.pop("has_kernel_name")
        self.__dict__.update(state)
        self.listeners = []
        self.lock = threading.RLock()
        self.buffer = self.buffer.view(torch.uint8)
        self.checkpoint = self._name(self.plan.source)
        self.kernel = self._name(self.plan.derived) if has_kernel_name else None

    def __repr__(self) -> str:
        state = self.state.value if self.state else "mixed"
        return f"AliasedStorage({self.label!r}, {self.plan.source} -> {self.plan.derived}, {self.plan.nbytes} bytes, {state})"
