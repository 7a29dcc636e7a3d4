"""Reading an MoE layer's kernel bytes one by one, by each kernel's index formula and independent of the transforms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..emulate import _code, _e4m3, _grid, _swizzled_scale
from ..format import BLOCK_SIZE
from .runners import MoENames, MoEShape
from .runners._base import MoERunner

#: Kernel row of a logical row: (0 for gate and w2, 1 for up; row within the half; rows of a padded half).
Place = Callable[[Tensor, Tensor, int], Tensor]


def weights(layer: MoENames, runner: MoERunner, shape: MoEShape, expert: int) -> tuple[Tensor, Tensor]:
    """(w13 ``[2I, H]``, or ``[I, H]`` without a gate; w2 ``[H, I]``) of one expert: code times block scale, float64, without
    global scales."""
    hidden, intermediate = shape.padded(runner.layout)
    w13_place, w2_place, swizzled = PLACES[runner.layout.of(shape.expert_activation).name]
    i, h = shape.intermediate, shape.hidden
    row, column = _grid(shape.w13_rows, h, layer.w13_weight_prepared.device)
    w13 = _read(layer.w13_weight_prepared[expert], layer.w13_blockscale_swizzled[expert], column, swizzled,
                w13_place(row // i, row % i, intermediate))  # fmt: skip
    row, column = _grid(h, i, layer.w13_weight_prepared.device)
    w2 = _read(layer.w2_weight_prepared[expert], layer.w2_blockscale_swizzled[expert], column, swizzled,
               w2_place(torch.zeros_like(row), row, hidden))  # fmt: skip
    return w13, w2


def _read(weight: Tensor, scales: Tensor, column: Tensor, swizzled: bool, place: Tensor) -> Tensor:
    code = _code(weight.reshape(-1), place * weight.shape[-1] + column // 2, column)
    if swizzled:
        return code * _swizzled_scale(scales, place, column)
    return code * _e4m3(scales.view(torch.uint8).reshape(-1)[place * scales.shape[-1] + column // BLOCK_SIZE])


def _gate_up(half: Tensor, row: Tensor, rows: int) -> Tensor:
    return half * rows + row


def _up_gate(half: Tensor, row: Tensor, rows: int) -> Tensor:
    return (1 - half) * rows + row


def _blocks(half: Tensor, row: Tensor, rows: int) -> Tensor:
    return 128 * (row // 64) + 64 * (1 - half) + row % 64


def _shuffled_rows(half: Tensor, row: Tensor, rows: int) -> Tensor:
    return 32 * (row // 32) + 8 * (row % 4) + (row % 32) // 4


def _shuffled_pairs(half: Tensor, row: Tensor, rows: int) -> Tensor:
    return _shuffled_rows(half, 2 * row + (1 - half), rows)


#: Layout name to (place of w13 rows, place of w2 rows, whether scales are swizzled).
PLACES: dict[str, tuple[Place, Place, bool]] = {
    "checkpoint": (_gate_up, _gate_up, False),
    "row-major": (_gate_up, _gate_up, False),
    "gate-up": (_gate_up, _gate_up, True),
    "up-gate": (_up_gate, _gate_up, True),
    "up-gate-128": (_up_gate, _gate_up, True),
    "interleaved": (_blocks, _gate_up, True),
    "shuffled": (_shuffled_pairs, _shuffled_rows, True),
    # Without a gate; every row is of half 0.
    "rows": (_gate_up, _gate_up, False),
    "rows-swizzled": (_gate_up, _gate_up, True),
    "rows-shuffled": (_shuffled_rows, _shuffled_rows, True),
}
