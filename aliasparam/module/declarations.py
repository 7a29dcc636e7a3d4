"""Declarations: what a module's author says about its names. Plain data; `registry.py` carries it out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

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

    Never aliased with a source, also not where it would broadcast: a scalar in a per-partition slot breaks the next reader
    of the partitions.

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


@dataclass(frozen=True)
class Keep:
    """``source`` is a checkpoint name without a kernel format: managed so that what derives from it is refreshed."""

    source: str


Declaration = Alias | Derivation | Keep
