"""The 128x4 block-scale swizzle."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ._tiles import TILE_COLUMNS, TileSwizzle


@dataclass(frozen=True)
class Swizzle128x4(TileSwizzle):
    """Block scales ``[..., R, C]`` to tiles of 128 rows by 4 columns, padded with zero bytes.

    With P the padded column count, byte (r, c) of a region goes to
    ``(r//128)*128*P + (c//4)*512 + (r%32)*16 + ((r%128)//32)*4 + c%4``
    (TensorRT-LLM ``computeSFIndex``, FlashInfer ``csrc/nv_internal/tensorrt_llm/thop/fp4Op.cpp``). Any dtype of one byte.
    A panel of 128 rows maps to itself; the buffer grows unless R % 128 == 0 and C % 4 == 0.
    """

    tile_rows = 128

    def to_tiles(self, panels: Tensor) -> Tensor:
        *lead, _, columns, _ = panels.shape
        return _exchange(panels.view(*lead, 4, 32, columns, TILE_COLUMNS))

    def to_panels(self, tiles: Tensor) -> Tensor:
        return _exchange(tiles.view(*tiles.shape[:-1], 32, 4, TILE_COLUMNS))


def _exchange(tiles: Tensor) -> Tensor:
    """Axes (row tile, row//32, row%32, col tile, col%4) to (row tile, col tile, row%32, row//32, col%4), or back."""
    return tiles.transpose(-4, -2)
