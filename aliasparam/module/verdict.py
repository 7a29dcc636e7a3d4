"""Whether a kernel name can live in its source's storage, and why.

Pure: looks at specs only, allocates nothing, so a plan can be made on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from ..errors import DeclarationError
from ..layout import BoundLayout, IndexLayout, Layout, OpaqueLayout
from ..layout.layout import bound_to
from ..spec import TensorSpec
from .declarations import AnyLayout, Order, Reencoding


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
#: False inside :func:`without_aliasing`.
aliasing_is_on = _switched_on.get


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


@dataclass(frozen=True)
class StoragePlan:
    """What one pair asks of its storage.

    Attributes:
        source: the checkpoint tensor.
        kernel: the kernel name.
        layout: order of the kernel name, and of the memory that they share; None: checkpoint order.
        bound: the same for this tensor.
        capacity: elements of the source's dtype that are allocated, room for other layouts included.
        reason: why they share memory, or why not.
    """

    source: TensorSpec
    kernel: TensorSpec
    layout: Order | None
    bound: BoundLayout
    capacity: int
    reason: Reason

    @cached_property
    def nbytes(self) -> int:
        return self.capacity * self.source.dtype.itemsize

    @cached_property
    def is_exact(self) -> bool:
        """Whether the memory is as large as the checkpoint tensor."""
        return self.nbytes == self.source.nbytes


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
    only_lines = all(other is None or isinstance(other, Layout) for other in (layout, *room_for))
    make = _plan_of_lines if only_lines else _plan  # the others hold functions and tables, which a cache would keep alive
    plan = make(source, layout, kernel_dtype or source.dtype, aliasing, room_for)
    # Lines that are equal may have other names for their digits, and users see them.
    return plan if plan.layout is None or plan.layout is layout else replace(plan, layout=layout)  # type: ignore[arg-type]


def _plan(
    source: TensorSpec, layout: AnyLayout | None, dtype: torch.dtype, aliasing: bool, room_for: tuple[AnyLayout | None, ...]
) -> StoragePlan:
    order = None if isinstance(layout, Reencoding) else layout
    bound = bound_to(order, *source)
    kernel = layout.output(source) if isinstance(layout, Reencoding) else TensorSpec(bound.kernel_shape, dtype)
    reason = judge(source, kernel, lossless=order is layout) if aliasing else Reason.SWITCHED_OFF
    rooms = [bound_to(other, *source) for other in room_for if not isinstance(other, Reencoding)]
    return StoragePlan(source, kernel, order, bound, max(b.regions * b.region_capacity for b in (bound, *rooms)), reason)


#: A model declares the same few lines for the same few shapes over and over.
_plan_of_lines = lru_cache(maxsize=4096)(_plan)


def layout_of(declared: Any, spec: TensorSpec) -> AnyLayout | None:
    """The layout which a declaration means: given, parsed from its line, or inferred from a repack function.

    Raises DeclarationError or LayoutError.
    """
    if declared is None or isinstance(declared, (Layout, IndexLayout, OpaqueLayout, Reencoding)):
        return declared
    if isinstance(declared, str):
        return Layout(declared)
    if callable(declared):
        return _inferred(declared, spec)
    raise DeclarationError(
        "this is no layout",
        expected="a Layout or its line, IndexLayout, OpaqueLayout, Reencoding, a repack function, or None",
        found=repr(declared),
        remedy="See the layouts page of the docs.",
    )


def _inferred(function: Callable[[Tensor], Tensor], spec: TensorSpec) -> AnyLayout:
    """The layout of a repack function, found by running it on position codes; kept for the last functions and shapes."""
    for kept, of, layout in _kept:
        if kept is function and of == spec:
            return layout
    found: AnyLayout = Layout.infer(function, spec.shape, spec.dtype)
    _kept.append((function, spec, found))
    del _kept[:-64]
    return found


#: By identity of the function: two that compare equal may hold other tables.
_kept: list[tuple[Callable[[Tensor], Tensor], TensorSpec, AnyLayout]] = []
