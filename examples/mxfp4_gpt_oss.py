"""gpt-oss experts (MXFP4) for FlashInfer's TRT-LLM MoE: rows to [up, gate] pairs, shuffled for the MMA; scales swizzled to 128x4.

gpt-oss stores gate and up rows interleaved (gate first); the kernel wants pairs with up first (``mxfp4.py`` in SGLang,
``swap_every_two_rows``), then ``shuffle_matrix_a`` and ``nvfp4_block_scale_interleave`` of FlashInfer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aliasparam import Alias, AliasRegistry, PermuteRows, declare
from aliasparam_nvfp4.layouts import ShuffleRows, Swizzle128x4


@dataclass(frozen=True)
class SwapPairs(PermuteRows):
    """Rows 2i and 2i+1 exchanged."""

    @property
    def block_rows(self) -> int | None:
        return 2

    def source_rows(self, rows: int) -> Tensor:
        return torch.arange(rows) ^ 1


def declare_mxfp4(layer: nn.Module) -> AliasRegistry:
    """``w13_weight`` u8 ``[E, 2I, H/2]``, ``w2_weight`` u8 ``[E, H, I/2]`` and their UE8M0 scales, one per 32 values."""
    shuffle, swizzle = ShuffleRows(128), Swizzle128x4()
    return declare(
        layer,
        Alias("w13_weight", "w13_prepared", SwapPairs().then(shuffle)),
        Alias("w13_weight_scale", "w13_scale_prepared", SwapPairs().then(shuffle).then(swizzle)),
        Alias("w2_weight", "w2_prepared", shuffle),
        Alias("w2_weight_scale", "w2_scale_prepared", shuffle.then(swizzle)),
        loaded=False,
    )


def make_layer(experts: int = 2, intermediate: int = 64, hidden: int = 128) -> nn.Module:
    layer = nn.Module()
    for name, rows, values in (("w13", 2 * intermediate, hidden), ("w2", hidden, intermediate)):
        for suffix, columns in (("weight", values // 2), ("weight_scale", values // 32)):
            empty = torch.empty(experts, rows, columns, dtype=torch.uint8)
            layer.register_parameter(f"{name}_{suffix}", nn.Parameter(empty, requires_grad=False))
    declare_mxfp4(layer)
    return layer
