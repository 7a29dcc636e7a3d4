"""Random checkpoint values of any dtype, and byte-wise comparison."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..spec import TensorSpec, is_wide


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a plain tensor, row-major, as flat uint8."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def random_values(spec: TensorSpec, random: torch.Generator) -> Tensor:
    """Values fit for weights and scales: positive finite floats, any byte of integers, any e4m3 value but NaN."""
    if spec.dtype.is_complex:
        return torch.view_as_complex(torch.rand((*spec.shape, 2), generator=random) + 0.5).to(spec.dtype)
    if is_wide(spec.dtype):
        return (torch.rand(spec.shape, generator=random) + 0.5).to(spec.dtype)
    if spec.dtype is torch.bool:
        return torch.randint(0, 2, spec.shape, generator=random).bool()
    data = torch.randint(0, 256, (spec.nbytes,), dtype=torch.uint8, generator=random)
    if spec.dtype.is_floating_point:
        data = torch.where((data & 0x7F) >= 0x7C, data & 0xF0, data)  # no NaN and no infinity in any 8-bit float
    return data.view(spec.dtype).reshape(spec.shape)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equal in shape, dtype and every byte; -0 and NaN payloads count."""
    same_kind = a.shape == b.shape and a.dtype == b.dtype
    return same_kind and torch.equal(as_bytes(a).cpu(), as_bytes(b).cpu())


#: Checkpoint values of one name: ``values(name, spec, random)``.
Values = Callable[[str, TensorSpec, torch.Generator], Tensor]


def any_values(name: str, spec: TensorSpec, random: torch.Generator) -> Tensor:
    return random_values(spec, random)
