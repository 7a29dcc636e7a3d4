"""``flashinfer_cutedsl``: FlashInfer ``cute_dsl_fused_moe`` (v2), compute capability 10.x.

Alpha, beta and limit are compiled into its epilogue, which multiplies its sums with ``w1_alpha`` first: they are of true values
(``blockscaled_contiguous_gather_grouped_gemm_act_fusion.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...layouts import mma_view
from ...quantize.format import BLOCK_SIZE
from ..activation import ExpertActivation
from ..layouts import INTERLEAVED
from ..scales import SwigluNumbers
from ._base import MoENames, MoERunner, MoEShape, padded_input, quantized_input


class FlashInferCuteDsl(MoERunner):
    name = "flashinfer_cutedsl"
    layout = INTERLEAVED
    activations = frozenset({"swiglu", "relu2"})
    swiglu_numbers = SwigluNumbers.AS_FLOATS
    capabilities = frozenset({(10, 0), (10, 3), (10, 7)})
    packages = ("flashinfer", "cutlass", "triton")
    dtypes = (torch.bfloat16, torch.float16)
    rank = 10
    call = "cute_dsl_fused_moe"

    def apply(self, layer: MoENames, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shape: MoEShape) -> Tensor:
        from flashinfer.fused_moe import cute_dsl_fused_moe

        codes, scales = quantized_input(padded_input(x, shape, self.layout), layer)
        hidden, intermediate = shape.padded(self.layout)
        blocks = hidden // BLOCK_SIZE, intermediate // BLOCK_SIZE
        rows = intermediate * (2 if shape.expert_activation.gated else 1)
        out = cute_dsl_fused_moe(
            x=codes,
            x_sf=scales,
            token_selected_experts=topk_ids.to(torch.int32),
            token_final_scales=topk_weights.float(),
            w1_weight=layer.w13_weight_prepared,
            w1_weight_sf=mma_view(layer.w13_blockscale_swizzled, rows, blocks[0], shape.experts),
            w1_alpha=layer.g1_alphas,
            fc2_input_scale=layer.w2_input_scale_quant,
            w2_weight=layer.w2_weight_prepared,
            w2_weight_sf=mma_view(layer.w2_blockscale_swizzled, hidden, blocks[1], shape.experts),
            w2_alpha=layer.g2_alphas,
            num_experts=shape.all_experts,
            top_k=topk_ids.shape[1],
            num_local_experts=shape.experts,
            local_expert_offset=shape.first_expert,
            **_flashinfer_activation(shape.expert_activation),
        )
        return out[:, : shape.hidden].to(x.dtype)  # type: ignore[no-any-return]


def _flashinfer_activation(activation: ExpertActivation) -> dict[str, Any]:
    from flashinfer.fused_moe import ActivationType

    if not activation.gated:
        return {"activation_type": int(ActivationType.Relu2)}
    numbers = {"swiglu_alpha": activation.alpha, "swiglu_beta": activation.beta}
    limit = {} if activation.limit is None else {"swiglu_limit": activation.limit}
    return {"activation_type": int(ActivationType.Swiglu), **numbers, **limit}


RUNNER = FlashInferCuteDsl()
