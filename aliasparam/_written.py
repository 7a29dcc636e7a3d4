"""Which bytes of a half-written storage have arrived."""

from __future__ import annotations

import torch
from torch import Tensor


class WrittenBytes:
    """Strided areas of a buffer that were written, kept as written and unfolded only when somebody asks."""

    def __init__(self) -> None:
        # (byte offset, sizes, byte strides, element width)
        self._areas: list[tuple[int, tuple[int, ...], tuple[int, ...], int]] = []

    def add(self, view: Tensor) -> None:
        """``view`` (a view of the buffer from its first byte on) was written."""
        width = view.element_size()
        strides = tuple(s * width for s in view.stride())
        self._areas.append((int(view.storage_offset()) * width, tuple(view.shape), strides, width))

    def clear(self) -> None:
        self._areas.clear()

    def mask(self, nbytes: int) -> Tensor:
        """bool ``[nbytes]``, True for bytes that arrived."""
        mask = torch.zeros(nbytes, dtype=torch.bool)
        for offset, sizes, strides, width in self._areas:
            mask.as_strided((*sizes, width), (*strides, 1), offset).fill_(True)
        return mask

    def has(self, view: Tensor, nbytes: int) -> bool:
        """Whether every byte of ``view`` arrived."""
        width = view.element_size()
        strides = (*(s * width for s in view.stride()), 1)
        return bool(self.mask(nbytes).as_strided((*view.shape, width), strides, view.storage_offset() * width).all())
