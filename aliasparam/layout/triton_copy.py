"""One Triton kernel for every strided copy: its axes are compile-time constants, so index arithmetic folds away.

torch's strided ``copy_`` walks the output in order and reads elements of a few bytes from many rows. Here a program copies a tile
that is contiguous in the value along its columns and in kernel memory along its rows, so whole sectors are used on both sides.
Offsets are int64, nothing is allocated, one launch copies all regions: it can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .execute import Axis, Copy

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

AVAILABLE = triton is not None
#: Bytes of the largest element; longer runs are vectors of them.
WIDEST = 8
#: Below this many bytes torch's copy is as fast, and no kernel needs compiling.
_SMALLEST = 1 << 18
#: Rows and columns of a tile, in elements; and where rows are runs on both sides.
_ROWS, _COLUMNS = 128, 32
_RUNS, _RUN = 16, 256


def wanted(copy: Copy, memory: Tensor, value: Tensor) -> bool:
    """Whether this copy is one that torch does badly: more than one run, on one GPU."""
    if not AVAILABLE or memory.device != value.device or copy.dtype.itemsize > WIDEST or len(copy.sizes) < 2:
        return False
    return math.prod(copy.sizes) * copy.dtype.itemsize >= _SMALLEST


def run(copy: Copy, kernel: Tensor, value: Tensor, *, write: bool) -> None:
    """``kernel`` and ``value``: tensors of the copy's dtype that start at its first element on either side."""
    target, source = (kernel, value) if write else (value, kernel)
    programs, constants = launch(copy, write=write)
    with torch.cuda.device_of(kernel):  # type: ignore[no-untyped-call]
        _copy[(programs,)](target, source, **constants, num_warps=4)


def launch(copy: Copy, *, write: bool) -> tuple[int, dict[str, Any]]:
    """Programs, and the kernel's constants."""
    grid, rows, columns = tile(copy)
    sides = ("kernel", "value") if write else ("value", "kernel")
    programs = math.prod(a.size for a in grid)
    m, n = (math.prod(a.size for a in axes) for axes in (rows, columns))
    runs = columns[-1].kernel == columns[-1].value == 1 and columns[-1].size >= _COLUMNS
    bm, bn = (min(_power(m), _RUNS), min(_power(n), _RUN)) if runs else (min(_power(m), _ROWS), min(_power(n), _COLUMNS))
    constants: dict[str, Any] = {"M": m, "N": n, "BM": bm, "BN": bn}
    for letter, axes in (("G", grid), ("R", rows), ("C", columns)):
        for at, side in zip("TS", sides, strict=True):  # target, source
            merged = _merged(axes, side)
            constants |= {f"{letter}{at}": len(merged)}
            constants |= {f"{letter}{at}_SIZE": tuple(a for a, _ in merged), f"{letter}{at}_STEP": tuple(s for _, s in merged)}
    return programs * -(-m // bm) * -(-n // bn), constants


def tile(copy: Copy) -> tuple[list[Axis], list[Axis], list[Axis]]:
    """Axes that number tiles, those of a tile's rows (close in kernel memory) and of its columns (close in the value)."""
    axes = [Axis(*a) for a in zip(copy.sizes, copy.kernel, copy.value, strict=True)]
    columns = _closest(axes, "value", _COLUMNS)
    rows = _closest([a for a in axes if a not in columns], "kernel", _ROWS)
    return [a for a in axes if a not in columns and a not in rows], rows, columns


def _closest(axes: list[Axis], side: str, enough: int) -> list[Axis]:
    found: list[Axis] = []
    for axis in sorted(axes, key=lambda a: (getattr(a, side), a)):
        if math.prod(a.size for a in found) >= enough:
            break
        found.insert(0, axis)
    return found


def _merged(axes: Sequence[Axis], side: str) -> list[tuple[int, int]]:
    """(size, step) on one side, joined where an axis continues the one before it, for an index that counts all of them."""
    merged: list[tuple[int, int]] = []
    for axis in axes:
        step = getattr(axis, side)
        if merged and merged[-1][1] == step * axis.size:
            merged[-1] = (merged[-1][0] * axis.size, step)
        else:
            merged.append((axis.size, step))
    return merged or [(1, 0)]


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


if AVAILABLE:

    @triton.jit
    def _offsets(index, COUNT: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr):
        """The sum of step times digit, over the digits of ``index`` (the last is the least significant)."""
        total = index * 0
        for i in tl.static_range(COUNT):
            if i < COUNT - 1:
                total += index % SIZE[COUNT - 1 - i] * STEP[COUNT - 1 - i]
                index = index // SIZE[COUNT - 1 - i]
            else:
                total += index * STEP[0]
        return total

    @triton.jit
    def _copy(
        target,
        source,
        M: tl.constexpr,
        N: tl.constexpr,
        BM: tl.constexpr,
        BN: tl.constexpr,
        GT: tl.constexpr,
        GT_SIZE: tl.constexpr,
        GT_STEP: tl.constexpr,
        GS: tl.constexpr,
        GS_SIZE: tl.constexpr,
        GS_STEP: tl.constexpr,
        RT: tl.constexpr,
        RT_SIZE: tl.constexpr,
        RT_STEP: tl.constexpr,
        RS: tl.constexpr,
        RS_SIZE: tl.constexpr,
        RS_STEP: tl.constexpr,
        CT: tl.constexpr,
        CT_SIZE: tl.constexpr,
        CT_STEP: tl.constexpr,
        CS: tl.constexpr,
        CS_SIZE: tl.constexpr,
        CS_STEP: tl.constexpr,
    ):
        program = tl.program_id(0).to(tl.int64)
        column = program % ((N + BN - 1) // BN) * BN + tl.arange(0, BN).to(tl.int64)
        program = program // ((N + BN - 1) // BN)
        row = program % ((M + BM - 1) // BM) * BM + tl.arange(0, BM).to(tl.int64)
        region = program // ((M + BM - 1) // BM)
        mask = (row < M)[:, None] & (column < N)[None, :]
        start = _offsets(region, GS, GS_SIZE, GS_STEP)
        at = _offsets(row, RS, RS_SIZE, RS_STEP)[:, None] + _offsets(column, CS, CS_SIZE, CS_STEP)[None, :]
        values = tl.load(source + start + at, mask=mask)
        start = _offsets(region, GT, GT_SIZE, GT_STEP)
        at = _offsets(row, RT, RT_SIZE, RT_STEP)[:, None] + _offsets(column, CT, CT_SIZE, CT_STEP)[None, :]
        tl.store(target + start + at, values, mask=mask)
