"""The layout which a declaration means: given, parsed from its line, or inferred from a repack function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..errors import DeclarationError
from ..layout import IndexLayout, Layout, OpaqueLayout
from ..spec import TensorSpec
from .declarations import AnyLayout, Reencoding


def layout_of(declared: Any, spec: TensorSpec) -> AnyLayout | None:
    """See the module. Raises DeclarationError or LayoutError."""
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
