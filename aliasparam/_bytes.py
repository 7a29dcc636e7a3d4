"""StorageBytes: one buffer, its names, the state of its regions, and reading it.

[Note: storage identity] From allocation on, the bytes may be rewritten but never moved: CUDA graphs and kernel objects hold
the address. Every name is a view of this one buffer. What a region's bytes mean is its state: see [Note: state] in _states.py.

[Note: threads] Loaders write shards from many threads. Whatever looks at a state and then touches bytes holds the storage's
lock, so a conversion never meets a write or a read of the same storage. Locks of several storages are taken in one order
(see :func:`all_locked`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from . import _convert
from ._kernel_name import KernelName
from ._reading import converted_copy
from ._regions import name_over, regions_of, regions_view
from ._states import RegionStates, State
from ._verdict import StoragePlan
from ._written import WrittenBytes
from .errors import MemoryFreedError, StateError


class Listener(Protocol):
    """Who shows kernel names that depend on a storage: a registry."""

    def mark_stale(self) -> None:
        """Something changed, or is about to."""

    def settle_guard(self) -> None:
        """What was about to change did not."""


class StorageBytes:
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
        #: Checkpoint bytes of a region.
        self.core_bytes = plan.source.nbytes // max(plan.regions, 1)
        self._states = RegionStates(plan.regions, state)
        self._written = WrittenBytes()
        self._why: str | None = None  # what made regions invalid, where that is not plain from the caller
        self.kernel_name: KernelName | None = None
        self.name_buffer(buffer, has_kernel_name=has_kernel_name and plan.reason.aliases)
        self._look()

    # -- names ---------------------------------------------------------------------------------------------------------

    def name_buffer(self, buffer: Tensor, *, has_kernel_name: bool) -> None:
        """Make the names over ``buffer``."""
        label = self.kernel_name.label if self.kernel_name is not None else self.label
        self.buffer, self.kernel_name = buffer, None
        with torch.inference_mode(False):
            self.checkpoint = name_over(buffer, self.plan, self.plan.source)
            if has_kernel_name:
                self.kernel_name = KernelName(label, name_over(buffer, self.plan, self.plan.derived), self)

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
        self._states.move(regions, to, doing, self.label)
        if self._written and (to is State.PARTIAL or to is State.INVALID):
            for region in regions:  # what arrived before a region is begun anew no longer counts
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
                remedy="Call aliasparam.invalidate(model) before memory is lent; have it back at its address, and load again.",
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

    def settle(self) -> None:
        """Turn PARTIAL regions whose bytes have all arrived into CHECKPOINT."""
        if not self._states.any_is(State.PARTIAL):
            return
        mask = self._written.mask(self.plan.nbytes)
        partial = [r for r, s in enumerate(self.states) if s is State.PARTIAL]
        full = [r for r in partial if bool(mask[r * self.plan.region_capacity :][: self.core_bytes].all())]
        self._move(full, State.CHECKPOINT, "settle")
