"""Declarations: what a module's author says about its names. Plain data; `_registry.py` carries it out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ._transform import Identity, Transform

#: What to do where a pair cannot alias: keep a copy, keep one and warn, or refuse the declaration.
Policy = Literal["copy", "warn", "error"]


@dataclass(frozen=True)
class Alias:
    """``derived`` is ``source`` in kernel format, in the same memory where the two are compatible.

    Args:
        source: checkpoint-format name, a registered Parameter of the module.
        derived: kernel-format name, registered as a non-persistent buffer.
        transform: checkpoint format to kernel format. Its inverse is checked on a probe at declaration.
        on_mismatch: what happens where the pair cannot alias.
        room_for: other kernel formats that the storage must have room for, see :meth:`AliasRegistry.retarget`.
    """

    source: str
    derived: str
    transform: Transform = field(default_factory=Identity)
    on_mismatch: Policy = "copy"
    room_for: tuple[Transform, ...] = ()


@dataclass(frozen=True)
class Derivation:
    """A small tensor computed from checkpoint values, in pointer-stable memory of its own.

    Never aliased with a source, also not where it would broadcast: a scalar in a per-partition slot breaks the next reader
    of the partitions.

    Args:
        name: the derived name, registered as a non-persistent buffer.
        sources: names it is computed from: checkpoint names, or derivations (chains refresh in order).
        function: called with one tensor per source, checkpoint values; returns a tensor of ``shape`` and ``dtype``.
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
