"""What one copy saves on the models people serve, from their dimensions.

The block-scale pairs of one layer are declared on the meta device, with the layouts a real layer declares; nothing is
allocated. Weights are converted in place by every engine, so the second copy they keep is that of the block scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from aliasparam import Alias, MemoryReport, declare, memory_report

from ..layouts import swizzle
from ..quantize.format import BLOCK_SIZE


@dataclass(frozen=True)
class MoEModel:
    """Dimensions of the experts of one model on one rank (sources: the models' config.json)."""

    name: str
    tensor_parallel: int
    layers: int
    experts: int
    hidden: int
    intermediate: int

    @property
    def intermediate_per_rank(self) -> int:
        return self.intermediate // self.tensor_parallel


MODELS = (
    MoEModel("Kimi-K2.5", 4, 60, 384, 7168, 2048),
    MoEModel("DeepSeek-V3", 8, 58, 256, 7168, 2048),
    MoEModel("Qwen3-235B-A22B", 4, 94, 128, 4096, 1536),
    MoEModel("Qwen3-30B-A3B", 4, 48, 128, 2048, 768),
)


def scale_report(model: MoEModel) -> MemoryReport:
    """The memory report of one layer's block scales on one rank."""
    layer = nn.Module()
    e, h, i = model.experts, model.hidden, model.intermediate_per_rank
    for name, shape in (("w13", (e, 2 * i, h // BLOCK_SIZE)), ("w2", (e, h, i // BLOCK_SIZE))):
        scale = torch.empty(shape, dtype=torch.float8_e4m3fn, device="meta")
        layer.register_parameter(f"{name}_weight_scale", nn.Parameter(scale, requires_grad=False))
    declare(
        layer,
        Alias("w13_weight_scale", "w13_blockscale_swizzled", swizzle()),
        Alias("w2_weight_scale", "w2_blockscale_swizzled", swizzle()),
    )
    return memory_report(layer)
