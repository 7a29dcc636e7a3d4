"""The TRT-LLM row shuffle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aliasparam import PermuteRows
from aliasparam.errors import TransformError


@dataclass(frozen=True)
class ShuffleRows(PermuteRows):
    """Rows in the order in which the transposed MMA's epilogue writes them (FlashInfer ``shuffle_matrix_a``).

    Within blocks of B rows, kernel row i is row ``B*(i//B) + (B//8)*(i%8) + (i%B)//8``; B is 32 for an epilogue tile of 128
    rows, 16 for 64 (``flashinfer/utils.py``, ``get_shuffle_matrix_a_row_indices``). For weights and, before the swizzle, for
    their block scales. Not an involution: applied twice it is wrong, five times (B = 32) it is the identity.
    """

    epilogue_tile: int = 128

    @property
    def block_rows(self) -> int | None:
        return 32 if self.epilogue_tile % 128 == 0 else 16

    def source_rows(self, rows: int) -> Tensor:
        block = self.block_rows or rows
        if rows % block:
            raise TransformError(
                f"the row shuffle for an epilogue tile of {self.epilogue_tile} works on blocks of {block} rows",
                expected=f"rows a multiple of {block}",
                found=rows,
                remedy="Pad the rows first (PadLast2).",
            )
        i = torch.arange(rows)
        return block * (i // block) + (block // 8) * (i % 8) + (i % block) // 8
