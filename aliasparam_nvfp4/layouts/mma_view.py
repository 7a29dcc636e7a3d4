"""Swizzled block scales looked at in other ways; nothing moves."""

from __future__ import annotations

from torch import Tensor

from aliasparam.errors import LayoutError


def mma_view(swizzled: Tensor, rows: int, columns: int, groups: int = 1) -> Tensor:
    """``[32, 4, rows/128, 4, columns/4, groups]`` over the bytes of 128x4-swizzled scales, for CuteDSL kernels.

    Element ``[r%32, (r%128)//32, r//128, c%4, c//4, e]`` is the scale of row r and column c of group e
    (FlashInfer ``cute_dsl/utils.py``, ``convert_sf_to_mma_layout``).

    Raises:
        LayoutError: the bytes are not those of whole 128x4 tiles.
    """
    row_tiles, column_tiles = -(-rows // 128), -(-columns // 4)
    if swizzled.numel() != groups * row_tiles * column_tiles * 512:
        raise LayoutError(
            "the scales are not padded to whole 128x4 tiles",
            expected=f"{groups * row_tiles * column_tiles * 512} bytes for {groups} x [{rows}, {columns}]",
            found=swizzled.numel(),
        )
    return swizzled.view(groups, row_tiles, column_tiles, 32, 4, 4).permute(3, 4, 1, 5, 2, 0)


def unswizzled(swizzled: Tensor, rows: int, columns: int) -> Tensor:
    """Row-major ``[rows, columns]`` of one matrix, in plain torch operators (a forward that is traced uses it)."""
    tiles = mma_view(swizzled, rows, columns)
    return tiles.permute(2, 1, 0, 4, 3, 5).reshape(tiles.shape[2] * 128, -1)[:rows, :columns]
