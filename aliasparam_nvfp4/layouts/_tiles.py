"""What the block-scale swizzles share: padding to whole tiles, and tiles of a panel of rows laid out one after another."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from aliasparam import Band, PadLast2, TensorSpec, Transform
from aliasparam.errors import TransformError

#: Block scales of one row in a tile.
TILE_COLUMNS = 4


class TileSwizzle(Transform):
    """Block scales ``[..., R, C]`` to tiles of ``tile_rows`` by 4, padded with zero bytes. Any dtype of one byte.

    A panel of ``tile_rows`` rows maps to itself; the buffer grows unless R and C are whole tiles.
    """

    core_dims: int = 2
    pads = True
    tile_rows: int

    @abstractmethod
    def to_tiles(self, panels: Tensor) -> Tensor:
        """u8 ``[..., row tile, row, column tile, column]`` to ``[..., row tile, column tile, *tile]``, as a view."""

    @abstractmethod
    def to_panels(self, tiles: Tensor) -> Tensor:
        """u8 ``[..., row tile, column tile, byte of the tile]`` back to ``[..., row tile, row, column tile, column]``."""

    @property
    def _pad(self) -> PadLast2:
        return PadLast2(rows=self.tile_rows, cols=TILE_COLUMNS)

    def output_spec(self, spec: TensorSpec) -> TensorSpec:
        if spec.dtype.itemsize != 1:
            raise TransformError("block scales are one byte each", expected="float8_e4m3fn or uint8", found=spec)
        return self._pad.output_spec(spec)

    def band(self, spec: TensorSpec) -> Band | None:
        return Band(-2, self.tile_rows)

    def forward(self, tensor: Tensor) -> Tensor:
        *lead, rows, columns = padded = self.output_spec(TensorSpec.of(tensor)).shape
        panels = self._pad.forward(tensor.view(torch.uint8))
        panels = panels.view(*lead, rows // self.tile_rows, self.tile_rows, columns // TILE_COLUMNS, TILE_COLUMNS)
        return self.to_tiles(panels).reshape(padded).view(tensor.dtype)

    def inverse(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
        *lead, rows, columns = padded = self.output_spec(spec).shape
        tiles = tensor.view(torch.uint8).reshape(*lead, rows // self.tile_rows, columns // TILE_COLUMNS, -1)
        return self._pad.inverse(self.to_panels(tiles).reshape(padded), TensorSpec(spec.shape, torch.uint8)).view(spec.dtype)
