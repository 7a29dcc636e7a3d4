"""TensorSpec: what a tensor looks like, without its memory."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor in one format."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


def is_wide(dtype: torch.dtype) -> bool:
    """A float that is not quantized."""
    return dtype.is_floating_point and dtype.itemsize > 1


def instances_in(values: Any, kind: type | tuple[type, ...]) -> Iterator[Any]:
    """Those of a class among an operator's arguments, also in lists of them."""
    for value in values:
        if isinstance(value, kind):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from instances_in(value, kind)


def other_kind(value: Any) -> str | None:
    """None of a tensor whose values lie at strides in memory (or nowhere: on meta); else what ``value`` is."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    if is_lazy(value):
        return "a parameter without a shape yet"
    if value.is_nested or value.is_quantized:
        return "a nested tensor" if value.is_nested else f"a quantized tensor ({value.dtype})"
    if value.layout is not torch.strided:
        return f"a tensor in {value.layout}"
    if isinstance(value, _distributed_tensors()):
        return f"a DTensor ({type(value).__name__}) of shape {list(value.shape)}, a part of a tensor over several ranks"
    if isinstance(value, FakeTensor):
        return "a stand-in for a tensor (FakeTensor)"
    is_plain = type(value).__torch_dispatch__ is Tensor.__torch_dispatch__
    freed = is_plain and value.numel() and not value.is_meta and not value.untyped_storage().nbytes()
    return "a tensor whose memory was freed" if freed else None


def _distributed_tensors() -> tuple[type, ...]:
    distributed: Any = sys.modules.get("torch.distributed.tensor")  # who has a DTensor has imported it
    return () if distributed is None else (distributed.DTensor,)


def no_values(value: Any) -> str | None:
    """The same, where one on meta is no answer either."""
    return "a tensor on meta" if isinstance(value, Tensor) and value.is_meta else other_kind(value)
