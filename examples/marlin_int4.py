"""INT4 weights of AWQ and GPTQ checkpoints in Marlin's tiles: the lines count nibbles. Without act-order."""

from __future__ import annotations

import torch
from torch import nn

from aliasparam import Alias, AliasRegistry, declare
from aliasparam.errors import LayoutError

from .lines import AWQ_WEIGHT, AWQ_ZEROS, GPTQ_WEIGHT, MARLIN_SCALES


def declare_int4(layer: nn.Module, *, awq: bool) -> AliasRegistry:
    """``qweight``, ``scales`` and, for AWQ, ``qzeros`` as the checkpoint stores them, and Marlin's order in the same memory.

    Raises:
        LayoutError: no whole tiles of 16 K by 64 N. Marlin has no padding.
    """
    rows, columns = layer.qweight.shape
    k, n = (rows, columns * 8) if awq else (rows * 8, columns)
    if k % 16 or n % 64:
        raise LayoutError("no Marlin tiles", name="qweight", expected="K % 16 == 0, N % 64 == 0", found=f"K={k}, N={n}")
    weight = Alias("qweight", "qweight_marlin", AWQ_WEIGHT if awq else GPTQ_WEIGHT)
    zeros = [Alias("qzeros", "qzeros_marlin", AWQ_ZEROS)] if awq else []
    return declare(layer, weight, Alias("scales", "scales_marlin", MARLIN_SCALES), *zeros, loaded=False)


def make_layer(k: int = 64, n: int = 128, group: int = 32, *, awq: bool = True) -> nn.Module:
    layer = nn.Module()
    layer.qweight = nn.Parameter(torch.empty((k, n // 8) if awq else (k // 8, n), dtype=torch.int32), requires_grad=False)
    layer.scales = nn.Parameter(torch.empty(k // group, n, dtype=torch.float16), requires_grad=False)
    if awq:
        layer.qzeros = nn.Parameter(torch.empty(k // group, n // 8, dtype=torch.int32), requires_grad=False)
    declare_int4(layer, awq=awq)
    return layer
