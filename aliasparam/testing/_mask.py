"""Which elements of a tensor have arrived, with nothing shared: one bool an element, looked at through the same views."""

from __future__ import annotations

import torch
from torch import Tensor

from ._values import as_bytes
from ._views import Step


def covers(arrived: Tensor, dtype: torch.dtype, steps: list[Step]) -> bool:
    """Whether every byte under a view has arrived."""
    bits = arrived.to(torch.uint8).mul(0xFF)[..., None].expand(*arrived.shape, dtype.itemsize).contiguous()
    seen = _followed(bits.view(-1).view(dtype).view(arrived.shape), steps)
    return bool((as_bytes(seen) == 0xFF).all())


def mark(arrived: Tensor, dtype: torch.dtype, steps: list[Step]) -> None:
    """The view was written: elements with all their bytes under it have arrived."""
    bits = torch.zeros(arrived.numel() * dtype.itemsize, dtype=torch.uint8)
    seen = _followed(bits.view(dtype).view(arrived.shape), steps)
    if seen.numel():
        seen.copy_(torch.full((seen.numel() * seen.element_size(),), 0xFF, dtype=torch.uint8).view(seen.dtype).view(seen.shape))
    arrived |= (bits.view(*arrived.shape, dtype.itemsize) == 0xFF).all(-1)


def _followed(tensor: Tensor, steps: list[Step]) -> Tensor:
    """Through the places of the views, without the conj and neg bits, which change no place."""
    for title, do in steps:
        tensor = tensor.imag if title == "conj().imag" else tensor if title == "conj()" else do(tensor)
    return tensor
