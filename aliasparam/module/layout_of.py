"""The layout which a declaration means: given, parsed from its line, or inferred from a repack function."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..errors import AliasError, DeclarationError, LayoutError
from ..layout import IndexLayout, Layout, OpaqueLayout
from ..spec import TensorSpec
from .declarations import Alias, AnyLayout, Reencoding


def layout_of(label: str, alias: Alias, spec: TensorSpec) -> AnyLayout | None:
    """See the module. Raises DeclarationError or LayoutError, with whose it is."""
    layout = alias.layout
    if layout is None or isinstance(layout, (Layout, IndexLayout, OpaqueLayout, Reencoding)):
        return layout
    try:
        if isinstance(layout, str):
            return Layout(layout)
        if callable(layout):
            return inferred(layout, spec)
    except AliasError as error:
        raise located(error, label, alias, spec) from None
    raise DeclarationError(
        "this is no layout",
        module=label,
        name=alias.source,
        expected="a Layout or its line, IndexLayout, OpaqueLayout, Reencoding, a repack function, or None",
        found=repr(layout),
        remedy="See the layouts page of the docs.",
    )


def inferred(function: Callable[[Tensor], Tensor], spec: TensorSpec) -> AnyLayout:
    """The layout of a repack function, found by running it on position codes; kept for the last functions and shapes."""
    for kept, of, layout in _inferred:
        if kept is function and of == spec:
            return layout
    found: AnyLayout = Layout.infer(function, spec.shape, spec.dtype)
    _inferred.append((function, spec, found))
    del _inferred[:-64]
    return found


#: By identity of the function: two that compare equal may hold other tables.
_inferred: list[tuple[Callable[[Tensor], Tensor], TensorSpec, AnyLayout]] = []


def located(error: AliasError, label: str, alias: Alias, spec: TensorSpec) -> AliasError:
    """A layout knows neither the module nor the name."""
    known = error.located(
        module=label,
        name=alias.source,
        expected=f"a shape and dtype that {alias.layout} takes",
        found=spec,
        remedy="Pad with a ragged leading digit, reshape the tensor first, or declare another layout.",
    )
    facts = {"module": known.module, "name": known.name, "expected": known.expected, "found": known.found, "remedy": known.remedy}
    return known if isinstance(error, (DeclarationError, LayoutError)) else DeclarationError(known.message, **facts)
