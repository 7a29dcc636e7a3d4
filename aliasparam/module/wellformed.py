"""Whether what was given to `declare` is of the right kinds, said by name before anything else looks at it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

import torch

from ..errors import DeclarationError
from .declarations import Alias, Declaration, Derivation, Policy

_POLICIES = get_args(Policy)


def need_wellformed(declarations: Sequence[Any]) -> None:
    """Raise DeclarationError for the first field that is of another kind than it is declared to be."""
    for declaration in declarations:
        if not isinstance(declaration, Declaration):
            raise DeclarationError("this is no declaration", expected="Alias, Derivation or Keep", found=repr(declaration))
        for field, fits, expected in _fields(declaration):
            if not fits:
                kind, name = type(declaration).__name__, getattr(declaration, "source", getattr(declaration, "name", None))
                raise DeclarationError(
                    f"{kind}.{field} is of another kind",
                    name=name if isinstance(name, str) else None,
                    expected=expected,
                    found=repr(getattr(declaration, field)),
                    remedy=f"See the arguments of aliasparam.{kind}.",
                )


def _fields(declaration: Declaration) -> Iterator[tuple[str, bool, str]]:
    """(field, whether its value is of its kind, what that is)."""
    if isinstance(declaration, Derivation):
        sources, shape, dtype = declaration.sources, declaration.shape, declaration.dtype
        yield "name", _is_name(declaration.name), "a name"
        yield "sources", _is_list(sources, str) and len(sources) > 0, "a tuple of names, one at least"
        yield "function", callable(declaration.function), "a function of the sources' values"
        yield "shape", _is_list(shape, int) and all(size >= 0 for size in shape), "a tuple of sizes of 0 or more"
        yield "dtype", isinstance(dtype, torch.dtype), "a torch.dtype"
        return
    yield "source", isinstance(declaration.source, str), "the name of a Parameter"
    if isinstance(declaration, Alias):
        yield "derived", _is_name(declaration.derived), "a name; Keep(source) for none"
        yield "on_mismatch", declaration.on_mismatch in _POLICIES, "'copy' (the default), 'warn' or 'error'"
        yield "dtype", declaration.dtype is None or isinstance(declaration.dtype, torch.dtype), "a torch.dtype, or None"
        yield "room_for", _is_list(declaration.room_for), "a tuple of layouts"


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_list(value: Any, kind: type | None = None) -> bool:
    if not isinstance(value, (tuple, Sequence)) or isinstance(value, str):
        return False
    return kind is None or all(type(item) is kind for item in value)
