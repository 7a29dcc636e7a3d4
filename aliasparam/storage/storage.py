"""AliasedStorage: one allocation in kernel order, read and written in checkpoint coordinates.

[Note: identity] From allocation on, bytes are rewritten and never moved: CUDA graphs and kernel objects hold the address.
[Note: order] The bytes are in kernel order from allocation on. A write scatters through the layout, a read gathers, and there
is no other order to convert from, to restore or to get stuck in. Padding is zero from allocation on and never written.
"""

from __future__ import annotations

import copy
import weakref
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import StateError
from ..layout import BoundLayout
from ..layout.bind import Bindable, bound_to
from ..spec import TensorSpec
from ..torch_private import outside_inference
from . import refusals
from .coverage import Box
from .kernel_name import KernelName
from .listeners import Listeners, RawWriter
from .locks import LOCKS, lock_number
from .scatter import scatter
from .states import RegionStates, State


class AliasedStorage:
    """A fixed buffer in kernel order.

    Args:
        label: ``module.name`` for messages.
        spec: the checkpoint tensor.
        layout: the order of its elements in memory; None for checkpoint order.
        buffer: flat uint8, zero wherever the layout pads. The storage owns it from now on.
        state: of every region at the start.
        kernel_dtype: dtype of the kernel name, of the same width; None where there is no kernel name.
    """

    def __init__(
        self,
        label: str,
        spec: TensorSpec,
        layout: Bindable | None,
        buffer: Tensor,
        state: State,
        kernel_dtype: torch.dtype | None = None,
    ) -> None:
        self.label = label
        self.spec = spec
        self.version = 0  #: Counts changes of content; whoever derives from this storage compares it with what it saw last.
        self._writer: weakref.ref[RawWriter] | None = None
        self.listeners = Listeners()
        self.lock_number = lock_number()
        self.kernel_dtype = kernel_dtype
        self.kernel_name: KernelName | None = None
        self._name(buffer, layout)
        self.states = RegionStates(spec.shape, self.bound.lead, state)

    layout: Bindable | None
    bound: BoundLayout
    buffer: Tensor
    elements: Tensor  #: Of the checkpoint's dtype, flat, with a version counter of its own: a write is none to the geometry.
    _address: int
    #: What the checkpoint name looks like; its bytes are the checkpoint's where the layout is the identity.
    geometry: Tensor

    # -- names ---------------------------------------------------------------------------------------------------------

    def _name(self, buffer: Tensor, layout: Bindable | None) -> None:
        """Make the views of ``buffer``: its elements, the checkpoint name's geometry, the kernel name; then show all at once."""
        spec, bound, kernel = self.spec, bound_to(layout, self.spec.shape, self.spec.dtype), None
        with outside_inference():
            elements = buffer.view(spec.dtype)
            geometry = elements[: spec.numel].view(spec.shape)
            if self.kernel_dtype is not None:
                label = self.label if self.kernel_name is None else self.kernel_name.label
                held = elements[: bound.regions * bound.region_capacity]  # room for other layouts lies behind it
                kernel = KernelName(label, held.view(self.kernel_dtype).view(bound.kernel_shape), self)
        shown = {"layout": layout, "bound": bound, "elements": elements.data, "geometry": geometry, "kernel_name": kernel}
        self.__dict__.update(shown, buffer=buffer, _address=buffer.data_ptr())

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """See [Note: locks]."""
        return LOCKS[self.lock_number]

    @property
    def state(self) -> State | None:
        """The common state of all regions, or None where they differ."""
        return self.states.common

    @property
    def is_loaded(self) -> bool:
        """Whether the kernel name may be used: everything arrived, or undeclared code put its bytes there."""
        states = self.states
        return (not states.missing or states.common is State.FOREIGN) and self.exposed is None

    @cached_property
    def blank_storage(self) -> torch.UntypedStorage:
        """What checkpoint names show as their raw storage where kernel order is not theirs: same size, no memory."""
        return torch.empty(self.buffer.numel(), dtype=torch.uint8, device="meta").untyped_storage()

    @property
    def exposed(self) -> str | None:
        """Who outside is writing the raw bytes now, or None. One that was dropped without an end has left rubbish."""
        if self._writer is None:
            return None
        writer = self._writer()
        if writer is None:
            self.unexpose()
            self.states.put_all(State.INVALID, "whoever wrote the raw bytes was dropped without an end")
            return None
        return writer.writer

    def expose(self, writer: RawWriter) -> None:
        """Let ``writer`` write the raw bytes: until :meth:`unexpose` nothing else reads or writes them."""
        with LOCKS[self.lock_number]:
            self.need_unexposed("expose")
            self.before_write()
            self._writer = weakref.ref(writer)

    def is_exposed_to(self, writer: RawWriter) -> bool:
        return self._writer is not None and self._writer() is writer

    def unexpose(self) -> None:
        self._writer = None

    # -- reading and writing -------------------------------------------------------------------------------------------

    def read(self, box: Box) -> Tensor:
        """Checkpoint values under ``box``: fresh, contiguous, of the box's shape.

        Raises:
            StateError: elements that never arrived, are invalid, or are being written from outside.
        """
        with LOCKS[self.lock_number]:
            self.need_readable(box)
            return self.bound.read(self.elements, box)

    def need_readable(self, box: Box) -> None:
        """Raise where the elements under ``box`` are no weights. The caller holds the lock."""
        self._look_at_memory()
        if self._writer is not None:
            self.need_unexposed("read")
        if self.states.missing:
            region = self.states.readable(box)
            if region is not None:
                raise self.not_loaded("reading elements that hold no weights", region)

    def write(self, box: Box, value: Tensor, non_blocking: bool = False) -> None:
        """Scatter ``value``, of the box's shape and of a dtype and device that ``copy_`` takes.

        Raises:
            StateError: the bytes are being written from outside. Nothing has changed then.
        """
        with LOCKS[self.lock_number]:
            self.before_write()
            before = self.states.begin(box)
            scatter(self.bound, self.elements, box, value, non_blocking)
            self.states.arrived(box, before)

    def before_write(self) -> None:
        """Refuse, or tell whoever must know; no byte has changed yet. The caller holds the lock."""
        self.need_writable()
        self.changing()

    def need_writable(self) -> None:
        """Raise StateError or MemoryFreedError where the bytes are not the library's to write. The caller holds the lock."""
        self._look_at_memory()
        if self._writer is not None:
            self.need_unexposed("write")

    def changing(self) -> None:
        """Bytes are about to change. An interrupt after this leaves a version that nobody has derived from."""
        self.tell()
        self.version += 1

    def tell(self) -> None:
        """What shows a kernel name of this storage or derives from it refuses from now on, until it is processed."""
        self.listeners.open_all()

    def invalidate(self, why: str | None = None) -> None:
        """Nobody knows what the bytes are (failed load, sleep). Only a whole rewrite leads out."""
        with LOCKS[self.lock_number]:
            self.changing()
            self.states.put_all(State.INVALID, why)
            self.unexpose()

    def accept(self) -> None:
        """The bytes, in kernel order, are whole and right: an engine saved and restored them, or wrote them from outside."""
        with LOCKS[self.lock_number]:
            self.changing()
            self.unexpose()
            if self.kernel_name is not None:
                self.kernel_name.accept()
            self.states.put_all(State.LOADED)

    def put_foreign(self, value: Tensor) -> None:
        """Kernel bytes whose order nobody declared: the kernel name holds them, the checkpoint name refuses to be read."""
        if self.kernel_name is None:
            raise AssertionError(f"{self.label}: foreign bytes without a kernel name")
        with LOCKS[self.lock_number]:
            self.before_write()
            self.states.put_all(State.INVALID)
            self.kernel_name.memory.copy_(value)
            self.kernel_name.accept()
            self.states.put_all(State.FOREIGN)

    # -- what other code does to the memory ----------------------------------------------------------------------------

    def _look_at_memory(self) -> None:
        if self.kernel_name is not None and self.kernel_name.was_written:
            self.notice()
        if self.buffer.data_ptr() != self._address:  # freed, or given other memory
            self.need_memory()

    def notice(self) -> None:
        """See whether other code wrote the kernel name. See [Note: foreign writes] in kernel_name.py."""
        name = self.kernel_name
        if name is not None and name.was_written and self.exposed is None:
            name.accept()
            self.invalidate(
                f"the kernel name {name.label.rpartition('.')[2]!r} was written by other code: only aliasparam.process() writes "
                "kernel names, and DistributedDataParallel, averaged models and the like must leave such buffers out"
            )

    def need_memory(self) -> None:
        """Raise MemoryFreedError where other code gave the memory back (``untyped_storage().resize_(0)``)."""
        held = self.buffer.untyped_storage().nbytes()
        if held < self.buffer.numel() and self.buffer.device.type != "meta":
            raise refusals.freed(self.label, self.buffer.numel(), held)

    def need_unexposed(self, doing: str) -> None:
        """Raise StateError while somebody outside writes the raw bytes."""
        if (writer := self.exposed) is not None:
            raise refusals.exposed(self.label, doing, writer)

    def not_loaded(self, doing: str, region: int | None = None) -> StateError:
        """What to raise where a region (default: the first) lacks elements."""
        return refusals.not_loaded(self.label, self.states, doing, region)

    # -- moving, copying -----------------------------------------------------------------------------------------------

    def relocate(self, device: torch.device) -> None:
        """Follow the module to another device: the one legal change of address, made by the owner."""
        with LOCKS[self.lock_number], outside_inference():
            self.notice()
            self.tell()
            self._name(self.buffer.to(device), self.layout)
            self.__dict__.pop("blank_storage", None)

    def rebind(self, layout: Bindable | None) -> None:
        """Another layout, whose bytes the caller has put in place. Addresses stay. The caller holds the lock."""
        self._name(self.buffer, layout)

    def _copied(self, buffer: Tensor) -> dict[str, Any]:
        """The state of a copy over ``buffer``, taken under the lock."""
        kept = ("label", "spec", "layout", "version", "kernel_dtype")
        label = self.kernel_name.label if self.kernel_name is not None else None
        return {k: self.__dict__[k] for k in kept} | {"buffer": buffer, "states": copy.deepcopy(self.states), "kernel": label}

    def __deepcopy__(self, memo: dict[int, Any]) -> AliasedStorage:
        with LOCKS[self.lock_number], outside_inference():
            self.notice()
            self.need_unexposed("copy")
            new = AliasedStorage.__new__(AliasedStorage)
            memo[id(self)] = new
            new.__setstate__(self._copied(self.buffer.clone()) | {"layout": copy.deepcopy(self.layout, memo)})
        if self.kernel_name is not None and new.kernel_name is not None:
            self.kernel_name.copied_as(new.kernel_name, memo)
        return new

    def __getstate__(self) -> dict[str, Any]:
        with LOCKS[self.lock_number], outside_inference():
            self.notice()
            self.need_unexposed("save")
            return self._copied(self.buffer.clone())

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        buffer, label = state.pop("buffer"), state.pop("kernel")
        self.__dict__.update(state)
        self._writer, self.listeners, self.lock_number = None, Listeners(), lock_number()
        self.kernel_name = None
        self._name(buffer, state["layout"])
        if self.kernel_name is not None:
            self.kernel_name.label = label

    def __repr__(self) -> str:
        state = self.state.value if self.state else "mixed"
        return f"AliasedStorage({self.label!r}, {self.spec}, {self.buffer.numel()} bytes, {state})"
