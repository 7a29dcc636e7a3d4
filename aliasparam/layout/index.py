"""A permutation that is no digit permutation, as a table."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import LayoutError
from ..host import HOST
from .bound import BoundLayout, RegionLayout
from .boxes import Box
from .execute import WIDE
from .nibbles import NibbleLayout


class IndexLayout:
    """Any order of the elements of one core shape: ``positions`` int64 (the core shape) is where each goes in kernel memory.

    ``kernel_shape`` is that of one region, padding included; without it, the core shape. ``bits=4``: both count nibbles in their
    last dim. Dims before the core number regions, as for :class:`Layout`. The table is kept once a device.

    Raises:
        LayoutError: no tensor of integers; two elements share a position, or one lies outside.
    """

    def __init__(self, positions: Tensor, kernel_shape: Sequence[int] | None = None, bits: int | None = None) -> None:
        kind = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
        if isinstance(kind, str) or kind.is_floating_point or kind.is_complex or kind is torch.bool:
            raise LayoutError("positions are integers", expected="an int64 tensor of the core shape", found=kind)
        positions = positions.detach().to(HOST, torch.int64).contiguous()
        self.kernel = tuple(positions.shape if kernel_shape is None else kernel_shape)
        self.bits, self._tables = bits, {HOST: positions}
        room = math.prod(self.kernel)
        flat = positions.view(-1)
        if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= room):
            raise LayoutError(
                "a position lies outside of the kernel memory", expected=f"0..{room - 1}", found=f"{int(flat.max())}"
            )
        if int(torch.zeros(room, dtype=torch.bool, device=HOST).index_fill_(0, flat, True).sum()) != flat.numel():
            raise LayoutError("two elements share a position", expected="a permutation")
        self._digest = hashlib.sha256(flat.numpy().tobytes() if flat.numel() else b"").digest()

    @property
    def positions(self) -> Tensor:
        return self.table(HOST)

    @property
    def core_dims(self) -> int:
        return self.positions.dim()

    def table(self, device: torch.device) -> Tensor:
        if device not in self._tables:
            self._tables[device] = self._tables[HOST].to(device)
        return self._tables[device]

    def bind(self, shape: Sequence[int], dtype: torch.dtype) -> BoundLayout:
        """This order for tensors whose last dims are the table's. Raises LayoutError for others."""
        shape, many = tuple(shape), 2 * dtype.itemsize if self.bits == 4 else 1
        lead = len(shape) - self.core_dims
        core = shape[max(lead, 0) :]
        if lead < 0 or (*core[:-1], core[-1] * many) != tuple(self.positions.shape):
            raise LayoutError("a table serves one shape", expected=f"[..., {list(self.positions.shape)}]", found=f"{list(shape)}")
        if self.bits == 4:
            return NibbleLayout(_Bound(self, tuple(self.positions.shape), 0, torch.uint8), shape, lead, dtype)
        return _Bound(self, shape, lead, dtype)

    def _key(self) -> tuple[Any, ...]:
        return self._digest, tuple(self.positions.shape), self.kernel, self.bits

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IndexLayout) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"IndexLayout({list(self.positions.shape)} -> {list(self.kernel)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return IndexLayout, (self.positions, self.kernel, self.bits)


class _Bound(RegionLayout):
    """An indexed copy of the part of the table that a box selects."""

    def __init__(self, layout: IndexLayout, shape: tuple[int, ...], lead: int, dtype: torch.dtype) -> None:
        super().__init__(shape, dtype, lead, layout.kernel, math.prod(layout.kernel))
        self._layout, self._bits = layout, WIDE[dtype.itemsize]

    def put(self, region: Tensor, core: Box, value: Tensor) -> None:
        region.view(self._bits).index_copy_(0, self._selected(core, region.device), value.view(self._bits).reshape(-1))

    def get(self, region: Tensor, core: Box) -> Tensor:
        return region.view(self._bits).index_select(0, self._selected(core, region.device)).view(self.dtype)

    def placed(self, within: Tensor) -> Tensor:
        return self._layout.table(within.device).view(-1)[within]

    def _selected(self, core: Box, device: torch.device) -> Tensor:
        return self._layout.table(device)[tuple(slice(*ends) for ends in core)].reshape(-1)
