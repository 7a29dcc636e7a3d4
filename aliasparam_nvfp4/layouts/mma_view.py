"""The 6-D view of swizzled block scales that CuteDSL kernels take."""

from __future__ import annotations

from torch import Tensor

from aliasparam.errors import TransformError


def mma_view(swizzled: Tensor, rows: int, columns: int, groups: int = 1) -> Tensor:
    """``[32, 4, rows/128, 4, columns/4, groups]`` over the bytes of 128x4-swizzled scales: a view, nothing moves.

    Element ``[r%32, (r%128)//32, r//128, c%4, c//4, e]`` is the scale of row r and column c of group e
    (FlashInfer ``cute_dsl/utils.py``, ``convert_sf_to_mma_layout``).

    Raises:
        TransformError: the bytes are not those of whole 128x4 tiles.
    """
    row_tiles, column_tiles = -(-rows // 128), -(-columns // 4)
    if swizzled.numel() != groups * row_tiles * column_tiles * 512:
        raise TransformError(
            "the scales are not padded to whole 128x4 tiles",
            expected=f"{groups * row_tiles * column_tiles * 512} bytes for {groups} x [{rows}, {columns}]",
            found=swizzled.numel(),
        )
    return swizzled.view(groups, row_tiles, column_tiles, 32, 4, 4).permute(3, 4, 1, 5, 2, 0)
