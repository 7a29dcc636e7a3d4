"""The 8x4 block-scale swizzle, for activations of few rows in TRT-LLM's GEMM."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ._tiles import TILE_COLUMNS, TileSwizzle


@dataclass(frozen=True)
class Swizzle8x4(TileSwizzle):
    """Block scales ``[..., R, C]`` to tiles of 8 rows by 4 columns, padded with zero bytes.

    With P the padded column count, byte (r, c) of a region goes to ``(r//8)*8*P + (c//4)*32 + (r%8)*4 + c%4``
    (FlashInfer ``csrc/nv_internal/tensorrt_llm/thop/fp4Op.cpp``, ``computeSFIndex`` for the 8x4 layout).
    """

    tile_rows = 8

    def to_tiles(self, panels: Tensor) -> Tensor:
        return panels.transpose(-3, -2)

    def to_panels(self, tiles: Tensor) -> Tensor:
        return tiles.view(*tiles.shape[:-1], 8, TILE_COLUMNS).transpose(-3, -2)
