"""AliasedStorage: one allocation in kernel order, read and written in checkpoint coordinates.

[Note: identity] From allocation on, bytes are rewritten and never moved: CUDA graphs and kernel objects hold the address.
[Note: order] The bytes are in kernel order from allocation on. A write scatters through the layout, a read gathers, and there
is no other order to convert from, to restore or to get stuck in. Padding is zero from allocation on and never written.
"""

from __future__ import annotations

import copy
from functools import cached_property
from multiprocessing.reduction import ForkingPickler
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import AdoptionError, DeclarationError, StateError
from ..layout.layout import Order, bound_to
from ..spec import TensorSpec
from ..torch_private import outside_inference, stand_ins
from .coverage import Box
from .guarded import GuardedMemory
from .kernel_name import KernelName
from .locks import LOCKS
from .shards import Form, Shard, shard_under
from .states import RegionStates, State
from .transaction import Part, write_all

#: Values that are out of place at a time where bytes are reordered, if the two orders can be cut that fine.
SCRATCH_BYTES = 16 << 20


class AliasedStorage(GuardedMemory):
    """A fixed buffer in kernel order.

    Args:
        label: ``module.name`` for messages.
        spec: the checkpoint tensor.
        layout: the order of its elements in memory; None for checkpoint order.
        buffer: flat uint8, a whole allocation, zero wherever the layout pads. The storage owns it from now on.
        state: of every region at the start.
        kernel_dtype: dtype of the kernel name, of the same width; None where there is no kernel name.

    Raises:
        DeclarationError: a buffer that is a part of an allocation.
    """

    def __init__(
        self,
        label: str,
        spec: TensorSpec,
        layout: Order | None,
        buffer: Tensor,
        state: State,
        kernel_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if buffer.storage_offset():
            raise DeclarationError(
                "the memory of a storage is a part of an allocation",
                label=label,
                expected="the begin of one",
                found=f"its byte {buffer.storage_offset()}",
                remedy="Give it an allocation of its own.",
            )
        self.label = label
        self.spec = spec
        self.kernel_dtype = kernel_dtype
        self.kernel_name: KernelName | None = None
        self._name(buffer, layout)
        self.states = RegionStates(self.bound, state)

    layout: Order | None
    _shards: dict[Form, Shard]
    #: What the checkpoint name looks like; its bytes are the checkpoint's where the layout is the identity.
    geometry: Tensor

    # -- names ---------------------------------------------------------------------------------------------------------

    def _name(self, buffer: Tensor, layout: Order | None) -> None:
        """Make the views of ``buffer``: its elements, the checkpoint name's geometry, the kernel name; then show all at once."""
        bound, kernel = bound_to(layout, *self.spec), None
        with outside_inference():
            elements = buffer.view(bound.dtype)
            geometry = elements.as_strided(bound.shape, bound.strides)
            if self.kernel_dtype is not None:
                label = self.label if self.kernel_name is None else self.kernel_name.label
                held = elements.view(self.kernel_dtype)  # room for other layouts lies behind the name
                kernel = KernelName(label, held.as_strided(bound.kernel_shape, bound.kernel_strides), self)
            elements = elements.data
        shown = {"layout": layout, "bound": bound, "elements": elements, "geometry": geometry, "kernel_name": kernel}
        self.__dict__.update(shown, buffer=buffer, _address=buffer.data_ptr(), _shards={})

    @cached_property
    def blank_storage(self) -> torch.UntypedStorage:
        """What checkpoint names show as their raw storage where kernel order is not theirs: same size, no memory."""
        return torch.empty(self.buffer.numel(), dtype=torch.uint8, device="meta").untyped_storage()

    # -- reading and writing -------------------------------------------------------------------------------------------

    def read(self, box: Box) -> Tensor:
        """Checkpoint values under ``box``: fresh, contiguous, of the box's shape.

        Raises:
            StateError: elements that never arrived, are invalid, or are being written from outside.
            LayoutError: the box is not within the tensor.
        """
        return self.gather(self.bound.checked(box))

    def gather(self, box: Box) -> Tensor:
        """:meth:`read` of a box that is known to be within the tensor."""
        with LOCKS[self.lock_number]:
            self.need_readable(box)
            return self.bound.read(self.elements, box)

    def need_readable(self, box: Box) -> None:
        """Raise where the elements under ``box`` are no weights. The caller holds the lock."""
        if stand_ins() is not None:
            raise self.among_stand_ins("among stand-ins for tensors there are no values to read")
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
            LayoutError: the box is not within the tensor, or the value not of its shape. Nothing has changed then.
        """
        box = self.bound.check_value(box, value.shape, self.bound.dtype)
        with LOCKS[self.lock_number]:
            write_all([Part(self, box, value)], non_blocking)

    def write_shard(self, view: Tensor, value: Tensor) -> bool:
        """:meth:`write` through ``view`` of :attr:`geometry`, where it is a shard for such values: what loaders do all day.
        False, and nothing has changed, where it is none. See [Note: shards].

        Raises:
            StateError: as :meth:`write`.
            RuntimeError: torch's own, where the shapes do not fit.
        """
        with LOCKS[self.lock_number]:
            self.need_writable()
            shard, region = shard_under(self.bound, self.elements, self._shards, view, value)
            if shard is None:
                return False
            self.changing()
            regions = (region,) if len(shard.regions) == 1 else [region + other for other in shard.regions]
            if self.states.missing:  # asked here, as a call would cost every shard
                self.clear_unknown(regions)
            before = self.states.begin_regions(regions)
            shard.write(region, value)
            self.states.arrived(shard.box, before)
        return True

    def accept(self, state: State | None = None) -> None:
        """The bytes, in kernel order, are whole and right: an engine saved and restored them, or wrote them from outside.
        LOADED: also where undeclared code has not made kernel bytes of them yet."""
        with LOCKS[self.lock_number]:
            self.invalidate_if_due()  # of what was there before
            self.changing()
            self.unexpose()
            if self.kernel_name is not None:
                self.kernel_name.accept()
            self.states.put_all(state or self.kernel_state)

    def put_foreign(self, value: Tensor) -> None:
        """Kernel bytes whose order nobody declared: the kernel name holds them, the checkpoint name refuses to be read. ``value``
        can be copied into its memory (see :func:`~aliasparam.storage.transaction.landable`)."""
        if self.kernel_name is None:
            raise AssertionError(f"{self.label}: foreign bytes without a kernel name")
        with LOCKS[self.lock_number]:
            self.before_write()
            self.states.put_all(State.INVALID)
            self.kernel_name.memory.copy_(value)
            self.kernel_name.accept()
            self.states.put_all(State.FOREIGN)

    # -- moving, copying -----------------------------------------------------------------------------------------------

    def relocate(self, device: torch.device) -> None:
        """Follow the module to another device: the one legal change of address, made by the owner."""
        with LOCKS[self.lock_number], outside_inference():
            self.need_writable()
            self.tell()
            self._name(self.buffer.to(device), self.layout)
            self.__dict__.pop("blank_storage", None)

    def move(self, layout: Order | None) -> None:
        """Bring the bytes into another order, in place and in pieces; INVALID until they are there. The caller holds the lock."""
        before = self.states.begin(self.bound.whole)
        self.bound.reorder(self.elements, bound_to(layout, *self.spec), SCRATCH_BYTES)
        self._name(self.buffer, layout)
        self.states.rollback(before)

    def __getstate__(self) -> dict[str, Any]:
        if stand_ins() is not None:
            raise self.among_stand_ins("among stand-ins for tensors there are no values to copy")
        with LOCKS[self.lock_number], outside_inference():
            self.notice()
            self.need_unexposed("copy")
            kept = {k: self.__dict__[k] for k in ("label", "spec", "layout", "version", "kernel_dtype")}
            label = self.kernel_name.label if self.kernel_name is not None else None
            return kept | {"buffer": self.buffer.clone(), "states": copy.deepcopy(self.states), "kernel": label}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__init__()
        kept = dict(state)
        buffer, label = kept.pop("buffer"), kept.pop("kernel")
        self.__dict__.update(kept, kernel_name=None)
        self._name(buffer, kept["layout"])
        if self.kernel_name is not None:
            self.kernel_name.label = label

    def __deepcopy__(self, memo: dict[int, Any]) -> AliasedStorage:
        new = AliasedStorage.__new__(AliasedStorage)
        new.__setstate__(self.__getstate__())
        memo[id(self)] = new
        if self.kernel_name is not None and new.kernel_name is not None:
            self.kernel_name.copied_as(new.kernel_name, memo)
        return new

    def __repr__(self) -> str:
        state = self.state.value if self.state else "mixed"
        return f"AliasedStorage({self.label!r}, {self.spec}, {self.buffer.numel()} bytes, {state})"


class ReadOnlyStorage(AliasedStorage):
    """A copy where a plain tensor would have given itself: it can be read, and refuses to be written.

    ``parameter.contiguous().fill_(0)`` writes a plain Parameter. Where the memory is in kernel order ``contiguous()`` must be
    a gathered copy, and a write into it would be lost without a word. So the copy is a view of a storage that nobody may write.

    Args:
        label: of the name whose values they are.
        values: dense, in memory of their own, flat.
    """

    def __init__(self, label: str, values: Tensor) -> None:
        memory = values.as_strided((values.numel(),), (1,)).view(torch.uint8)
        super().__init__(label, TensorSpec((values.numel(),), values.dtype), None, memory, State.LOADED)

    def need_writable(self) -> NoReturn:
        raise StateError(
            "contiguous() of a name in kernel format is a gathered copy: a write into it would be lost",
            label=self.label,
            expected="a write through the name itself",
            found="one into the copy",
            remedy="Write the parameter, its .data or a slice of them: they are contiguous in shape and strides.",
        )


def refuse_for_process(owner: Any) -> NoReturn:
    raise AdoptionError(
        "a declared module cannot be sent to another process: torch would move its memory to a shared segment",
        label=owner.label,
        expected="values, or a module that is not declared",
        found="a declared module",
        remedy="Send checkpoint_state_dict(module), or declare in the other process.",
    )


ForkingPickler.register(AliasedStorage, refuse_for_process)
