"""One Triton kernel for every strided copy: its axes are compile-time constants, so index arithmetic folds away.

torch's strided ``copy_`` walks the output in order and reads elements of a few bytes from many rows. Here a program copies a tile
that is contiguous in the value along its columns and in kernel memory along its rows, so whole sectors are used on both sides.
Offsets are int64, nothing is allocated, one launch copies all regions: it can be captured in a CUDA graph.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .execute import Axis, Copy, joined

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

AVAILABLE = triton is not None
#: Bytes of the largest element; longer runs are vectors of them.
WIDEST = 8
#: Below this many bytes torch's copy is as fast, and no kernel needs compiling.
SMALLEST = 1 << 18
#: Bytes that a tile's columns have at least, and two elements: of a value's axes those that lie closest. One more would lie apart
#: in kernel memory, where rows are to be a run.
_ACROSS = 8
#: Rows of a tile, in elements; where they are runs on both sides, of so many elements each; and elements of a tile.
_ROWS = 128
_RUNS, _RUN = 16, 32
_TILE = 2048

_launches: dict[Hashable, Callable[..., None]] = {}


def takes(memory: Tensor, value: Tensor) -> bool:
    """Whether both lie on one GPU that Triton compiles for."""
    return AVAILABLE and memory.is_cuda and memory.device == value.device and memory.element_size() <= WIDEST


def wanted(copy: Copy) -> bool:
    """Whether this copy is one that torch does badly (more than one run) or not at all (backwards)."""
    if len(copy.sizes) > 1 and math.prod(copy.sizes) * copy.dtype.itemsize >= SMALLEST:
        return True
    return any(stride < 0 for stride in copy.kernel)


def run(copy: Copy, kernel: Tensor, value: Tensor, *, write: bool) -> None:
    """``kernel`` and ``value``: tensors of the copy's dtype that start at its first element on either side."""
    target, source = (kernel, value) if write else (value, kernel)
    start(_copy, (copy.form, write), (target, source), partial(launch, copy, write=write))


def start(function: Any, key: Hashable, tensors: tuple[Tensor, ...], planned: Callable[[], tuple[int, dict[str, Any]]]) -> None:
    """Launch a Triton kernel on ``tensors`` with the programs and constants that ``planned`` gives for ``key``.

    Triton's own way to a compiled kernel binds and hashes all constants again, which is most of its host time. It compiles for
    pointers that are or are not multiples of 16, and a compiled kernel must be launched with its own kind.
    """
    aligned = tuple(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    kept = function, key, aligned, tensors[0].device
    again = _launches.get(kept)
    with torch.cuda.device_of(tensors[0]):  # type: ignore[no-untyped-call]
        if again is not None:
            again(*tensors)
            return
        programs, constants = planned()
        compiled = function[(programs,)](*tensors, **constants, num_warps=4)
    if compiled is not None:  # None: interpreted
        grid, values = compiled[(programs, 1, 1)], tuple(constants.values())
        _launches[kept] = lambda *tensors: grid(*tensors, *values)


def launch(
    copy: Copy, *, write: bool, columns: str = "value", least: int | None = None, elements: int = _TILE
) -> tuple[int, dict[str, Any]]:
    """Programs, and the kernel's constants.

    Args:
        columns: on which side a tile's columns lie close together.
        least: how many columns it has at least; None: see ``_ACROSS``.
        elements: of a tile.
    """
    grid, rows, across = tile(copy, columns, least or max(_ACROSS // copy.dtype.itemsize, 2))
    sides = ("kernel", "value") if write else ("value", "kernel")
    programs = math.prod(a.size for a in grid)
    m, n = (math.prod(a.size for a in axes) for axes in (rows, across))
    runs = across[-1].kernel == across[-1].value == 1 and across[-1].size >= _RUN
    bm = min(_power(m), _RUNS if runs else _ROWS)
    bn = min(_power(n), elements // bm)
    constants: dict[str, Any] = {"TILE": (m, n, bm, bn)}
    for letter, side in zip("TS", sides, strict=True):  # target, source; tuples within one are no constants to Triton 3.6
        for name, axes in (("GRID", grid), ("ROWS", rows), ("COLUMNS", across)):
            constants[f"{letter}_{name}"] = tuple(itertools.chain(*_merged(axes, side)))
    return programs * -(-m // bm) * -(-n // bn), constants


def tile(copy: Copy, columns: str, least: int) -> tuple[list[Axis], list[Axis], list[Axis]]:
    """Axes that number tiles, those of a tile's rows (close in kernel memory) and of its columns (close in the value)."""
    axes = [Axis(*a) for a in zip(copy.sizes, copy.kernel, copy.value, strict=True)]
    across = _closest(axes, columns, least)
    rows = _closest([a for a in axes if a not in across], "kernel", _ROWS)
    return [a for a in axes if a not in across and a not in rows], rows, across or [Axis(1, 1, 1)]


def _closest(axes: list[Axis], side: str, enough: int) -> list[Axis]:
    found: list[Axis] = []
    for axis in sorted(axes, key=lambda a: (abs(getattr(a, side)), a)):
        if math.prod(a.size for a in found) >= enough:
            break
        found.insert(0, axis)
    return found


def _merged(axes: Sequence[Axis], side: str) -> list[tuple[int, int]]:
    """(size, step) on one side, joined where an axis continues the one before it, for an index that counts all of them."""
    steps = joined(Axis(axis.size, getattr(axis, side), getattr(axis, side)) for axis in axes)
    return [(axis.size, axis.kernel) for axis in steps] or [(1, 0)]


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


if AVAILABLE:

    @triton.jit
    def offsets(index, AXES: tl.constexpr):
        """The sum of step times digit, over the digits of ``index``: size and step of each, the least significant last."""
        total = index * 0
        for i in tl.static_range(len(AXES) - 2, 0, -2):
            total += index % AXES[i] * AXES[i + 1]
            index = index // AXES[i]
        return total + index * AXES[1]

    @triton.jit
    def place(TILE: tl.constexpr):
        """Of this program: which tile of the grid, its rows and columns, and which of these exist. See :func:`tile`."""
        M: tl.constexpr = TILE[0]
        N: tl.constexpr = TILE[1]
        BM: tl.constexpr = TILE[2]
        BN: tl.constexpr = TILE[3]
        program = tl.program_id(0).to(tl.int64)
        column = program % ((N + BN - 1) // BN) * BN + tl.arange(0, BN).to(tl.int64)
        program = program // ((N + BN - 1) // BN)
        row = program % ((M + BM - 1) // BM) * BM + tl.arange(0, BM).to(tl.int64)
        mask = (row < M)[:, None] & (column < N)[None, :]
        return program // ((M + BM - 1) // BM), row, column, mask

    @triton.jit
    def address(grid, row, column, GRID: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """Of each element of a tile on one side, from the first of the copy."""
        return offsets(grid, GRID) + (offsets(row, ROWS)[:, None] + offsets(column, COLUMNS)[None, :])

    @triton.jit
    def _copy(
        target,
        source,
        TILE: tl.constexpr,
        T_GRID: tl.constexpr,
        T_ROWS: tl.constexpr,
        T_COLUMNS: tl.constexpr,
        S_GRID: tl.constexpr,
        S_ROWS: tl.constexpr,
        S_COLUMNS: tl.constexpr,
    ):
        grid, row, column, mask = place(TILE)
        values = tl.load(source + address(grid, row, column, S_GRID, S_ROWS, S_COLUMNS), mask=mask)
        tl.store(target + address(grid, row, column, T_GRID, T_ROWS, T_COLUMNS), values, mask=mask)
