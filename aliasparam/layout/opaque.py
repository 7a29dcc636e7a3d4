"""A bijection given as two functions, read and written by whole regions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import LayoutError
from ..host import HOST
from .bound import BoundLayout, RegionLayout, flat_bytes
from .boxes import Box
from .trace import Function


class OpaqueLayout:
    """``encode`` brings a region's checkpoint values to kernel format, ``decode`` back; both pure. The bytes are
    as many unless encoding pads.

    ``decode`` gets what ``encode`` returned: its dtype, its shape. Regions are indexed by the dims before the last ``core_dims``.
    A partial write decodes the region, patches it and encodes it again. ``probe_device``: where the two are tried when bound.

    Raises (when bound):
        LayoutError: ``decode(encode(x)) != x`` for random bytes, or encoding changes the size of an element.
    """

    def __init__(self, encode: Function, decode: Function, *, core_dims: int = 2, probe_device: str = "cpu") -> None:
        self.encode, self.decode, self.core_dims, self.probe_device = encode, decode, core_dims, probe_device

    def bind(self, shape: Sequence[int], dtype: torch.dtype) -> BoundLayout:
        return _Bound(self, tuple(shape), dtype)

    def __deepcopy__(self, memo: Any) -> OpaqueLayout:
        return self

    def __repr__(self) -> str:
        return f"OpaqueLayout({getattr(self.encode, '__qualname__', self.encode)})"


class _Bound(RegionLayout):
    def __init__(self, layout: OpaqueLayout, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        lead = len(shape) - layout.core_dims
        if lead < 0:
            raise LayoutError(f"{layout} takes {layout.core_dims} dims", found=f"{list(shape)}")
        probe = _random(shape[lead:], dtype, layout.probe_device)
        kernel = layout.encode(probe.clone())
        if not isinstance(kernel, Tensor) or kernel.element_size() != dtype.itemsize:
            found = kernel.dtype if isinstance(kernel, Tensor) else type(kernel).__name__
            raise LayoutError(f"{layout} changes the size of an element", expected=f"{dtype.itemsize} bytes each", found=found)
        super().__init__(shape, dtype, lead, kernel.shape)
        self._layout, self._kernel = layout, (kernel.dtype, tuple(kernel.shape))
        back = layout.decode(kernel.clone())
        if back.shape != probe.shape or back.dtype is not dtype or not torch.equal(flat_bytes(back), flat_bytes(probe)):
            raise LayoutError(f"{layout}: decode does not invert encode", expected=f"{dtype} {list(probe.shape)}, the same bytes")
        if not torch.equal(flat_bytes(layout.encode(probe.clone())), flat_bytes(kernel)):
            raise LayoutError(f"{layout}: encoding the same values twice gives other bytes")

    def put(self, region: Tensor, core: Box, value: Tensor) -> None:
        plain = value.clone(memory_format=torch.contiguous_format)  # its own: the function may work in place
        whole = self.whole[self.lead :]
        if core != whole:
            patch, plain = plain, self.get(region, whole)
            plain[tuple(slice(*ends) for ends in core)] = patch
        kernel = self._layout.encode(plain)
        if (kernel.dtype, tuple(kernel.shape)) != self._kernel:
            raise self.unfit(self._kernel, (kernel.dtype, tuple(kernel.shape)))
        region.view(torch.uint8).copy_(flat_bytes(kernel))

    def get(self, region: Tensor, core: Box) -> Tensor:
        dtype, shape = self._kernel
        plain = self._layout.decode(region.view(torch.uint8).clone().view(dtype).view(shape))
        return plain[tuple(slice(*ends) for ends in core)]


def _random(shape: Sequence[int], dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    bits = 2 if dtype is torch.bool else 256  # a copy of any other bool is none of its bytes
    raw = torch.randint(bits, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator, device=HOST)
    return raw.view(dtype).view(*shape).to(device)
