"""Which bytes of a half-written storage have arrived."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class WrittenBytes:
    """Strided areas of a buffer that were written, kept as written and unfolded only when somebody asks."""

    def __init__(self) -> None:
        # In order: (byte offset, sizes, byte strides) of an area that arrived, or (first, end) of bytes that no longer count.
        self._log: list[tuple[int, tuple[int, ...], tuple[int, ...]] | tuple[int, int]] = []

    def add(self, view: Tensor) -> None:
        """``view`` (a view of the buffer from its first byte on) was written."""
        self._log.append(_area(view))

    def forget(self, first: int, end: int) -> None:
        """Bytes ``[first, end)`` no longer hold what arrived."""
        if self._log:
            self._log.append((first, end))

    def clear(self) -> None:
        self._log.clear()

    def mask(self, nbytes: int) -> Tensor:
        """bool ``[nbytes]``, True for bytes that arrived."""
        mask = torch.zeros(nbytes, dtype=torch.bool)
        for entry in self._log:
            if len(entry) == 2:
                mask[entry[0] : entry[1]] = False
            else:
                mask.as_strided(entry[1], entry[2], entry[0]).fill_(True)
        return mask

    def has(self, view: Tensor, nbytes: int, loaded: Iterable[tuple[int, int]] = ()) -> bool:
        """Whether every byte of ``view`` arrived, or lies in ``loaded`` (first, end) ranges."""
        mask = self.mask(nbytes)
        for first, end in loaded:
            mask[first:end] = True
        offset, sizes, strides = _area(view)
        return bool(mask.as_strided(sizes, strides, offset).all())


def _area(view: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    width = view.element_size()
    return view.storage_offset() * width, (*view.shape, width), (*(s * width for s in view.stride()), 1)
