"""Whether a kernel name can live in its source's storage, and why.

Pure: looks at specs only, allocates nothing, so a plan can be made on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, get_args
from weakref import WeakValueDictionary

from torch import Tensor

from ..errors import DeclarationError, foreign_code
from ..layout import BoundLayout, Layout
from ..layout.layout import bound_to
from ..spec import TensorSpec
from .declarations import Alias, AnyLayout, Reencoding


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
        layout: what was declared for the kernel name; None: checkpoint order.
        bound: the order of the memory that they share, for this tensor.
        capacity: elements of the source's dtype that are allocated, room for other layouts included.
        reason: why they share memory, or why not.
    """

    source: TensorSpec
    kernel: TensorSpec
    layout: AnyLayout | None
    bound: BoundLayout
    capacity: int
    reason: Reason

    @property
    def nbytes(self) -> int:
        return self.capacity * self.source.dtype.itemsize


def plan_of(alias: Alias, source: TensorSpec) -> StoragePlan:
    """The plan of one pair, with room for other layouts that it may be moved to.

    Raises:
        DeclarationError, LayoutError: what was declared is no layout of this shape and dtype.
    """
    if not all(one is None or isinstance(one, Layout) for one in (alias.layout, *alias.room_for)):
        return _planned(alias, source)
    key = alias.layout, alias.room_for, alias.dtype, source
    plan = _in_use.get(key)
    if plan is None:
        plan = _in_use[key] = _planned(alias, source)
    # Lines that are equal may have other names for their digits, and users see them.
    return plan if plan.layout is alias.layout else replace(plan, layout=alias.layout)  # type: ignore[arg-type]


#: Plans of lines, while somebody has one: a model declares the same few for the same few shapes over and over.
_in_use: WeakValueDictionary[tuple[Any, ...], StoragePlan] = WeakValueDictionary()


def _planned(alias: Alias, source: TensorSpec) -> StoragePlan:
    if alias.dtype is not None and alias.dtype.itemsize != source.dtype.itemsize:
        raise DeclarationError(
            "a kernel name shows the same elements, so its dtype has their width",
            expected=f"a dtype of {source.dtype.itemsize} bytes",
            found=alias.dtype,
            remedy="Give the kernel a view of another width where it is called, or declare a Reencoding.",
        )
    expected = f"a shape and dtype that {alias.layout} takes"
    remedy = "Pad with a ragged leading digit, reshape the tensor first, declare another layout, or mend its functions."
    with foreign_code(f"this layout failed on {source}", DeclarationError, expected=expected, found=source, remedy=remedy):
        layout, *others = (layout_of(declared, source) for declared in (alias.layout, *alias.room_for))
        bound, *rooms = (bound_to(None if isinstance(one, Reencoding) else one, *source) for one in (layout, *others))
        kernel = TensorSpec(bound.kernel_shape, alias.dtype or source.dtype)
        kernel = layout.output(source) if isinstance(layout, Reencoding) else kernel
    capacity = max(one.capacity for one in (bound, *rooms))
    reason = judge(source, kernel, lossless=not isinstance(layout, Reencoding))
    return StoragePlan(source, kernel, layout, bound, capacity, reason)


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


def layout_of(declared: Any, spec: TensorSpec) -> AnyLayout | None:
    """The layout which a declaration means: given, parsed from its line, or inferred from a repack function.

    Raises DeclarationError or LayoutError.
    """
    if declared is None or isinstance(declared, get_args(AnyLayout)):
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
