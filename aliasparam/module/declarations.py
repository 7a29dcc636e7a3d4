"""Declarations: what a module's author says about its names. Plain data, of the right kinds; `registry.py` carries it out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ..errors import DeclarationError
from ..layout.layout import Order as Order
from ..spec import TensorSpec

#: What to do where a pair cannot alias: keep a copy, keep one and warn, or refuse the declaration.
Policy = Literal["copy", "warn", "error"]


@dataclass(frozen=True)
class Reencoding:
    """A kernel format whose values have another width or meaning: no layout, so it gets memory of its own and the source is kept.

    Args:
        function: checkpoint values to kernel values. Pure; it is given a copy.
        output: the kernel name's shape and dtype for a checkpoint tensor's.
    """

    function: Callable[[Tensor], Tensor]
    output: Callable[[TensorSpec], TensorSpec]


#: Where a kernel has the elements: the memory is the checkpoint tensor's.
AnyLayout: TypeAlias = Order | Reencoding


@dataclass(frozen=True)
class Alias:
    """``derived`` is ``source`` in kernel order, in the same memory where the two are compatible.

    Args:
        source: checkpoint name, a registered Parameter of the module.
        derived: kernel name, registered as a non-persistent buffer.
        layout: where the kernel has the elements: a :class:`Layout` or its line; an :class:`IndexLayout` or
            :class:`OpaqueLayout`; a :class:`Reencoding`; or a bare repack function, from which it is inferred
            (:meth:`Layout.infer`). None: checkpoint order.
        on_mismatch: what happens where the pair cannot alias.
        room_for: other layouts that the storage must have room for, see :meth:`AliasRegistry.retarget`.
        dtype: the kernel name's, of the same width; None for the source's.
    """

    source: str
    derived: str
    layout: AnyLayout | str | Callable[[Tensor], Tensor] | None = None
    on_mismatch: Policy = "copy"
    room_for: tuple[AnyLayout | str | None, ...] = ()
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Derivation:
    """A small tensor computed from checkpoint values, in pointer-stable memory of its own.

    It never shares memory with a source, even where it would broadcast: a scalar in the place of one value per partition
    breaks whoever reads the partitions next.

    Args:
        name: the derived name, registered as a non-persistent buffer.
        sources: names it is computed from: checkpoint names, or other derivations (chains refresh in order).
        function: called with one tensor per source, copies of checkpoint values; returns a tensor of ``shape`` and ``dtype``.
        shape: fixed shape of the result.
        dtype: fixed dtype of the result.
    """

    name: str
    sources: tuple[str, ...]
    function: Callable[..., Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.shape, self.dtype)


@dataclass(frozen=True)
class Keep:
    """``source`` is a checkpoint name without a kernel format, declared so that derivations follow what is written to it."""

    source: str


Declaration = Alias | Derivation | Keep

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
