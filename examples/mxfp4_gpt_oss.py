"""gpt-oss experts (MXFP4) for FlashInfer's TRT-LLM MoE: rows to [up, gate] pairs, shuffled for the MMA; scales swizzled to 128x4.

gpt-oss stores gate and up rows interleaved (gate first); the kernel wants pairs with up first (``mxfp4.py`` in SGLang,
``swap_every_two_rows``), then ``shuffle_matrix_a`` and ``nvfp4_block_scale_interleave`` of FlashInfer.
"""

from __future__ import annotations

import torch
from torch import nn

from aliasparam import Alias, AliasRegistry, declare

from .lines import MXFP4_W2, MXFP4_W2_SCALE, MXFP4_W13, MXFP4_W13_SCALE


def declare_mxfp4(layer: nn.Module) -> AliasRegistry:
    """``w13_weight`` u8 ``[E, 2I, H/2]``, ``w2_weight`` u8 ``[E, H, I/2]`` and their UE8M0 scales, one per 32 values."""
    return declare(
        layer,
        Alias("w13_weight", "w13_prepared", MXFP4_W13),
        Alias("w13_weight_scale", "w13_scale_prepared", MXFP4_W13_SCALE),
        Alias("w2_weight", "w2_prepared", MXFP4_W2),
        Alias("w2_weight_scale", "w2_scale_prepared", MXFP4_W2_SCALE),
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
