"""Whether what was given to `declare` is of the right kinds, said by name before anything else looks at it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import DeclarationError
from .declarations import Alias, Derivation, Keep


def need_wellformed(module: nn.Module, declarations: Sequence[Any]) -> None:
    """Raise DeclarationError for the first field that is of another kind than it is declared to be."""
    if not isinstance(module, nn.Module):
        raise DeclarationError("declarations are of a module", expected="an nn.Module", found=type(module).__name__)
    label = type(module).__name__
    for declaration in declarations:
        if not isinstance(declaration, (Alias, Derivation, Keep)):
            raise DeclarationError(
                "this is no declaration", module=label, expected="Alias, Derivation or Keep", found=repr(declaration)
            )
        for field, value, fits, expected in _fields(declaration):
            if not fits:
                kind, name = type(declaration).__name__, getattr(declaration, "source", getattr(declaration, "name", None))
                raise DeclarationError(
                    f"{kind}.{field} is of another kind",
                    module=label,
                    name=name if isinstance(name, str) else None,
                    expected=expected,
                    found=repr(value),
                )


def _fields(declaration: Alias | Derivation | Keep) -> Iterator[tuple[str, Any, bool, str]]:
    """(field, value, whether it is of its kind, what that is)."""
    if isinstance(declaration, Derivation):
        sources, shape = declaration.sources, declaration.shape
        names = isinstance(sources, Sequence) and not isinstance(sources, str) and all(isinstance(n, str) for n in sources)
        sizes = isinstance(shape, Sequence) and not isinstance(shape, str) and all(type(n) is int and n >= 0 for n in shape)
        yield "name", declaration.name, _is_name(declaration.name), "a name"
        yield "sources", sources, names and len(sources) > 0, "a tuple of names, one at least"
        yield "function", declaration.function, callable(declaration.function), "a function of the sources' values"
        yield "shape", shape, sizes, "a tuple of sizes of 0 or more"
        yield "dtype", declaration.dtype, isinstance(declaration.dtype, torch.dtype), "a torch.dtype"
        return
    yield "source", declaration.source, isinstance(declaration.source, str), "the name of a Parameter"
    if isinstance(declaration, Alias):
        yield "derived", declaration.derived, _is_name(declaration.derived), "a name; Keep(source) for none"
        dtype = declaration.dtype
        yield "dtype", dtype, dtype is None or isinstance(dtype, torch.dtype), "a torch.dtype, or None"
        room = declaration.room_for
        yield "room_for", room, isinstance(room, Sequence) and not isinstance(room, str), "a tuple of layouts"


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def warn_of_trained(module: nn.Module, declarations: Sequence[Alias | Derivation | Keep]) -> None:
    """A Parameter that asks for gradients gets none any more: its kernel bytes are no function of autograd."""
    sources = {s for d in declarations for s in (d.sources if isinstance(d, Derivation) else (d.source,))}
    trained = sorted(n for n in sources if (p := module._parameters.get(n)) is not None and p.requires_grad and not is_lazy(p))
    if trained:
        warnings.warn(
            f"{type(module).__name__}: {', '.join(trained)} had requires_grad=True and will have no gradients: declared "
            "names are not trained. Register them with requires_grad=False, or train a tensor of your own and write it in.",
            UserWarning,
            stacklevel=3,
        )
