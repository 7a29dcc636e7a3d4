"""Which bytes of a half-written storage have arrived."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class WrittenBytes:
    """Strided areas of a buffer that were written, kept as written and unfolded only when somebody asks."""

    def __init__(self) -> None:
        # In order: (offset, sizes, strides, element width) of an area that arrived, (first, end) of bytes that no longer count.
        self._log: list[Any] = []

    def add(self, view: Tensor) -> None:
        """``view`` (a view of the buffer from its first byte on) was written."""
        self._log.append((view.storage_offset(), tuple(view.shape), view.stride(), view.element_size()))

    def forget(self, first: int, end: int) -> None:
        """Bytes ``[first, end)`` no longer hold what arrived."""
        self._log.append((first, end))

    def __bool__(self) -> bool:
        """Whether anything arrived."""
        return bool(self._log)

    def clear(self) -> None:
        self._log.clear()

    def mask(self, nbytes: int) -> Tensor:
        """bool ``[nbytes]``, True for bytes that arrived."""
        mask = torch.zeros(nbytes, dtype=torch.bool)
        for entry in self._log:
            if len(entry) == 2:
                mask[entry[0] : entry[1]] = False
            else:
                _bytes(mask, *entry).fill_(True)
        return mask

    def has(self, view: Tensor, nbytes: int, loaded: Iterable[tuple[int, int]] = ()) -> bool:
        """Whether every byte of ``view`` arrived, or lies in ``loaded`` (first, end) ranges."""
        mask = self.mask(nbytes)
        for first, end in loaded:
            mask[first:end] = True
        area = int(view.storage_offset()), tuple(view.shape), view.stride(), view.element_size()
        return bool(_bytes(mask, *area).all())


def _bytes(mask: Tensor, offset: int, sizes: tuple[int, ...], strides: tuple[int, ...], width: int) -> Tensor:
    """The view of ``mask``, one element a byte, that an area is of the buffer."""
    return mask.as_strided((*sizes, width), (*(s * width for s in strides), 1), offset * width)
