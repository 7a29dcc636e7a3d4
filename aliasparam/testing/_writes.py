"""Ways to write a tensor, done alike to a name and to its oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..spec import TensorSpec
from ._values import random_values


@dataclass(frozen=True)
class Write:
    """``do(target, value)``; ``reads``: the result depends on what was there; ``arithmetic``: not for 8-bit floats."""

    title: str
    do: Callable[[Any, Tensor], Any]
    reads: bool = False
    arithmetic: bool = False


def _index_put(target: Any, value: Tensor) -> None:
    target[torch.arange(target.shape[0], device=target.device)] = value


def _mask_put(target: Any, value: Tensor) -> None:
    target[torch.arange(target.shape[0], device=target.device) % 2 == 0] = 0


WRITES = (
    Write("copy_", lambda t, v: t.copy_(v)),
    Write("copy_ of strided values", lambda t, v: t.copy_(torch.stack([v, v], -1)[..., 1])),
    Write("copy_ of a transposed copy", lambda t, v: t.copy_(v.movedim(0, -1).contiguous().movedim(-1, 0) if v.dim() else v)),
    Write("copy_ of one value", lambda t, v: t.copy_(v.reshape(-1)[:1].reshape([1] * t.dim()) if v.numel() else v)),
    Write(
        "copy_ of other dtype", lambda t, v: t.copy_(v.to(torch.complex128 if v.is_complex() else torch.float64)), arithmetic=True
    ),
    Write("data.copy_", lambda t, v: t.data.copy_(v)),
    Write("[...] =", lambda t, v: t.__setitem__(..., v)),
    Write("zero_", lambda t, v: t.zero_()),
    Write("fill_", lambda t, v: t.fill_(3)),
    Write("_foreach_copy_", lambda t, v: torch._foreach_copy_([t], [v])),
    Write("add(out=)", lambda t, v: torch.add(v, 1, out=t), arithmetic=True),
    Write("add_", lambda t, v: t.add_(v), reads=True, arithmetic=True),
    Write("mul_", lambda t, v: t.mul_(2), reads=True, arithmetic=True),
    Write("_foreach_mul_", lambda t, v: torch._foreach_mul_([t], 2), reads=True, arithmetic=True),
    Write("copy_ of itself and more", lambda t, v: t.copy_(t + 1), reads=True, arithmetic=True),
    Write("index_put", _index_put, reads=True, arithmetic=True),
    Write("mask_put", _mask_put, reads=True, arithmetic=True),
)


def values_like(tensor: Tensor, random: torch.Generator) -> Tensor:
    return random_values(TensorSpec.of(tensor), random)


def has_arithmetic(dtype: torch.dtype) -> bool:
    return not (dtype.itemsize == 1 and dtype.is_floating_point)
