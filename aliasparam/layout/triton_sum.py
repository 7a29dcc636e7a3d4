"""One Triton kernel for the two sums of adler32 over kernel memory, with positions in checkpoint order.

A permutation does not change which bytes a sum takes, only at which position each stands, and that follows from the digits. So
memory is read once, in its own order, and nothing is gathered. Four bytes at a time: ``dp4a`` gives their sum and their sum
weighted with 0 to 3 in one instruction each.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .execute import Copy
from .triton_copy import AVAILABLE, launch, start

if AVAILABLE:
    import triton
    import triton.language as tl

    from .triton_copy import address, offsets, place

#: Bytes of the widest element, for which there is an instruction.
WIDEST = 4
MOD = 65521
#: Columns of a tile at least, and its elements: nothing is written, so both are close in kernel memory alone.
_COLUMNS, _TILE = 32, 4096


def sums(copy: Copy, kernel: Tensor) -> Tensor:
    """Of the bytes of ``copy``, and of each times its byte position in the value, congruent mod 65521: int64 ``[2]``.

    ``kernel`` starts at the copy's first element in kernel memory. No sum overflows for less than 2**37 bytes.
    """
    dp4a = kernel.is_cuda and torch.version.hip is None and copy.dtype is torch.int32
    planned = _planned(copy._replace(kernel_offset=0, value_offset=0), dp4a)
    parts = torch.empty(planned[0], 2, dtype=torch.int64, device=kernel.device)  # of each program
    start(_sums, copy.form, (parts, kernel), lambda: planned)
    found = parts.sum(0)
    if copy.value_offset:  # the kernel counts from the first element of the copy
        found[1] += found[0] % MOD * (copy.value_offset * copy.dtype.itemsize % MOD)
    return found


@lru_cache(maxsize=4096)
def _planned(copy: Copy, dp4a: bool) -> tuple[int, dict[str, Any]]:
    programs, constants = launch(copy, write=False, columns="kernel", least=_COLUMNS, elements=_TILE)
    return programs, constants | {"WIDTH": copy.dtype.itemsize, "FAST": dp4a}


if AVAILABLE:

    @triton.jit
    def _sums(
        sums,
        source,
        TILE: tl.constexpr,
        T_GRID: tl.constexpr,
        T_ROWS: tl.constexpr,
        T_COLUMNS: tl.constexpr,
        S_GRID: tl.constexpr,
        S_ROWS: tl.constexpr,
        S_COLUMNS: tl.constexpr,
        WIDTH: tl.constexpr,
        FAST: tl.constexpr,
    ):
        slot = sums + tl.program_id(0).to(tl.int64) * 2
        grid, row, column, mask = place(TILE)
        words = tl.load(source + address(grid, row, column, S_GRID, S_ROWS, S_COLUMNS), mask=mask, other=0)
        plain, inner = _bytes(words, WIDTH, FAST)
        high = (offsets(grid, T_GRID) + offsets(row, T_ROWS)) * WIDTH % 65521
        low = offsets(column, T_COLUMNS) * WIDTH % 65521
        position = high.to(tl.uint32)[:, None] + low.to(tl.uint32)[None, :]
        weighted = inner.to(tl.uint64) + plain.to(tl.uint64) * position.to(tl.uint64)
        tl.store(slot, tl.sum(plain).to(tl.int64))
        tl.store(slot + 1, tl.sum(weighted).to(tl.int64))

    @triton.jit
    def _bytes(words, WIDTH: tl.constexpr, FAST: tl.constexpr):
        """The sum of the bytes of each element, and each byte times its place in the element; u32."""
        if FAST:
            code: tl.constexpr = "{ .reg .u32 z; mov.u32 z, 0; dp4a.u32.u32 $0, $1, $2, z; }"
            ones = tl.full(words.shape, 0x01010101, tl.int32)
            places = tl.full(words.shape, 0x03020100, tl.int32)
            plain = tl.inline_asm_elementwise(code, "=r,r,r", [words, ones], dtype=tl.uint32, is_pure=True, pack=1)
            inner = tl.inline_asm_elementwise(code, "=r,r,r", [words, places], dtype=tl.uint32, is_pure=True, pack=1)
        else:
            wide = words.to(tl.int64)
            plain = (wide & 0xFF).to(tl.uint32)
            inner = plain * 0
            for i in tl.static_range(1, WIDTH):
                byte = ((wide >> (8 * i)) & 0xFF).to(tl.uint32)
                plain += byte
                inner += byte * i
        return plain, inner
