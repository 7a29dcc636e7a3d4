"""Whether a kernel name can live in its source's storage, and why.

Pure: looks at specs only, allocates nothing, so a plan can be made on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum

import torch

from ..layout import BoundLayout
from ..layout.bind import Bindable, bound_to
from ..spec import TensorSpec
from .declarations import AnyLayout, Reencoding


class Reason(Enum):
    """Why a pair aliases or falls back to a copy.

    ``reason.code`` is stable and meant for programs; the value is the text that users see.
    """

    SAME = "same shape and dtype"
    SAME_BYTES = "same bytes under another shape or same-width dtype"
    PADDED = "kernel format is larger by declared padding: one padded capacity"
    ELEMENT_WIDTH = "element widths differ"
    BROADCAST = "kernel format is a broadcast of the source, or the source of it"
    SMALLER = "kernel format is smaller than the checkpoint format (a reduction, not a layout)"
    LOSSY = "the kernel format re-encodes values: the source is kept"
    OTHER_DEVICE = "on another device than its source"
    UNDECLARED_SHAPE = "value of another shape or dtype from undeclared code"
    OWN_MEMORY = "the derived name has memory of its own already, and no address moves"
    SWITCHED_OFF = "aliasing is switched off"

    @property
    def aliases(self) -> bool:
        return self in (Reason.SAME, Reason.SAME_BYTES, Reason.PADDED)

    @property
    def code(self) -> str:
        """``same``, ``same-bytes``, ``padded``, ``element-width``, …"""
        return self.name.lower().replace("_", "-")


_switched_on: ContextVar[bool] = ContextVar("aliasing", default=True)


def aliasing_is_on() -> bool:
    """False inside :func:`without_aliasing`."""
    return _switched_on.get()


@contextmanager
def without_aliasing() -> Iterator[None]:
    """Inside the block declarations give every kernel name memory of its own, as ``declare(..., aliasing=False)`` does.

    Results must be the same (law 7). For code that calls ``declare`` or the ported helpers itself.
    """
    token = _switched_on.set(False)
    try:
        yield
    finally:
        _switched_on.reset(token)


@dataclass(frozen=True, slots=True)
class StoragePlan:
    """What one pair asks of its storage.

    Attributes:
        source: the checkpoint tensor.
        kernel: the kernel name.
        layout: order of the memory: that of the pair, or None (checkpoint order) where the kernel name is a copy.
        bound: the same for this tensor.
        capacity: elements of the source's dtype that are allocated, room for other layouts included.
        reason: why they share memory, or why not.
    """

    source: TensorSpec
    kernel: TensorSpec
    layout: Bindable | None
    bound: BoundLayout
    capacity: int
    reason: Reason

    @property
    def nbytes(self) -> int:
        return self.capacity * self.source.dtype.itemsize


def judge(source: TensorSpec, kernel: TensorSpec, *, lossless: bool = True) -> Reason:
    """The compatibility verdict for one pair, from what both formats look like."""
    if not lossless:
        return Reason.LOSSY
    if source.dtype.itemsize != kernel.dtype.itemsize:
        return Reason.ELEMENT_WIDTH
    if kernel.nbytes < source.nbytes:
        return Reason.BROADCAST if _broadcasts(kernel.shape, source.shape) else Reason.SMALLER
    if kernel.nbytes > source.nbytes:
        return Reason.PADDED
    return Reason.SAME if source == kernel else Reason.SAME_BYTES


def _broadcasts(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    """Whether ``small`` broadcasts to ``large``: every trailing dim is equal or 1, and at least one is 1 or absent."""
    if len(small) > len(large):
        return False
    return all(a in (b, 1) for a, b in zip(reversed(small), reversed(large), strict=False))


def plan_storage(
    source: TensorSpec,
    layout: AnyLayout | None,
    *,
    kernel_dtype: torch.dtype | None = None,
    aliasing: bool = True,
    room_for: tuple[AnyLayout | None, ...] = (),
) -> StoragePlan:
    """Plan the storage of a source and its kernel name, with room for other layouts that it may be moved to.

    Raises:
        LayoutError: the digits of a layout do not fit the shape.
    """
    plain = bound_to(None, source.shape, source.dtype)
    if isinstance(layout, Reencoding):
        kernel = layout.output(source)
        reason = judge(source, kernel, lossless=False)
        return StoragePlan(source, kernel, None, plain, source.numel, reason if aliasing else Reason.SWITCHED_OFF)
    bound = bound_to(layout, source.shape, source.dtype)
    kernel = TensorSpec(bound.kernel_shape, kernel_dtype or source.dtype)
    reason = judge(source, kernel) if aliasing else Reason.SWITCHED_OFF
    if not reason.aliases:
        return StoragePlan(source, kernel, None, plain, source.numel, reason)
    rooms = [bound_to(other, source.shape, source.dtype) for other in room_for if not isinstance(other, Reencoding)]
    capacity = max(b.regions * b.region_capacity for b in (bound, *rooms))
    return StoragePlan(source, kernel, layout, bound, capacity, reason)
