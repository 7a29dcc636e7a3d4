"""Layouts of 4-bit elements: regions are unpacked to a byte a nibble, written or read, and packed again, one at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LayoutError
from .bound import BoundLayout, RegionLayout, flat_bytes
from .boxes import Box, sizes


class NibbleLayout(RegionLayout):
    """A digit permutation of nibbles, low nibble first in each byte, over a tensor of bytes or little-endian words.

    ``inner`` is the permutation of one region with a byte for a nibble. Scratch: three times the bytes of a region.
    """

    def __init__(self, inner: BoundLayout, shape: tuple[int, ...], lead: int, dtype: torch.dtype) -> None:
        self.many = many = 2 * dtype.itemsize
        *kernel, last = inner.kernel_shape
        if last % many:
            raise LayoutError(f"the last kernel dim has no whole {dtype}", expected=f"a multiple of {many} nibbles", found=last)
        super().__init__(shape, dtype, lead, (*kernel, last // many))
        self.inner, self.is_identity = inner, inner.is_identity

    def put(self, region: Tensor, core: Box, value: Tensor) -> None:
        core, nibbles = self._nibbles(core), unpack(region)
        self.inner.write(nibbles, core, unpack(value).view(sizes(core)))
        region.copy_(pack(nibbles).view(self.dtype))

    def get(self, region: Tensor, core: Box) -> Tensor:
        return pack(self.inner.read(unpack(region), self._nibbles(core)).view(-1)).view(self.dtype)

    def _nibbles(self, core: Box) -> Box:
        *rest, (start, stop) = core
        return (*rest, (start * self.many, stop * self.many))


def unpack(words: Tensor) -> Tensor:
    """A byte a nibble, flat."""
    packed = flat_bytes(words)
    return torch.stack((packed & 15, packed >> 4), -1).view(-1)


def pack(nibbles: Tensor) -> Tensor:
    """The inverse: u8, two nibbles a byte."""
    low, high = nibbles.view(-1, 2).unbind(-1)
    return high << 4 | low
