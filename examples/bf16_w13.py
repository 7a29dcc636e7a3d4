"""Unquantized experts for kernels that want `[up; gate]` (FlashInfer's CUTLASS MoE, for one)."""

from __future__ import annotations

import torch
from torch import nn

from aliasparam import Alias, AliasRegistry, declare

from .lines import W13_UP_GATE


def declare_w13(layer: nn.Module) -> AliasRegistry:
    """``w13_weight`` bf16 ``[E, 2I, H]``, rows ``[gate; up]``, as ``w13_prepared`` with rows ``[up; gate]``."""
    return declare(layer, Alias("w13_weight", "w13_prepared", W13_UP_GATE), loaded=False)


def make_layer(experts: int = 3, intermediate: int = 4, hidden: int = 6) -> nn.Module:
    layer = nn.Module()
    shape = (experts, 2 * intermediate, hidden)
    layer.w13_weight = nn.Parameter(torch.empty(shape, dtype=torch.bfloat16), requires_grad=False)
    declare_w13(layer)
    return layer
