"""``flashinfer_cutlass``: FlashInfer ``cutlass_fused_moe``. int64 weights and int32 scales say NVFP4 to it (``binding.cu``).

Alpha, beta, limit and biases are of true values: the kernel multiplies its sums with ``quant_scales[2]`` first
(``cutlass_fused_moe_kernels.cuh``, ``doActivationKernel``, ``SwigluBiasAdaptor``). It takes both biases or none, in the dtype of
its output (``binding.cu``, ``runMoe``), and adds the second on ``tp_rank`` 0 alone (``setupTmaWarpSpecializedInputs``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..biases import UP_GATE
from ..layouts import UP_GATE_SWIZZLED
from ..scales import SwigluNumbers
from ._base import MoENames, MoERunner, MoEShape, padded_input


class FlashInferCutlass(MoERunner):
    name = "flashinfer_cutlass"
    layout = UP_GATE_SWIZZLED
    activations = frozenset({"swiglu", "relu2"})
    swiglu_numbers = SwigluNumbers.OF_TRUE_VALUES
    biases = UP_GATE
    capabilities = frozenset({(10, 0), (10, 3), (10, 7), (11, 0), (12, 0), (12, 1)})
    packages = ("flashinfer",)
    dtypes = (torch.bfloat16, torch.float16)
    rank = 20
    call = "cutlass_fused_moe"

    def apply(self, layer: MoENames, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shape: MoEShape) -> Tensor:
        from flashinfer.fused_moe import ActivationType, cutlass_fused_moe

        out = cutlass_fused_moe(
            padded_input(x, shape, self.layout),
            topk_ids.to(torch.int32),
            topk_weights.float(),
            layer.w13_weight_prepared.view(torch.int64),
            layer.w2_weight_prepared.view(torch.int64),
            x.dtype,
            [
                layer.w13_input_scale_quant[0],
                layer.w13_blockscale_swizzled.view(torch.int32),
                layer.g1_alphas,
                layer.w2_input_scale_quant[0],
                layer.w2_blockscale_swizzled.view(torch.int32),
                layer.g2_alphas,
            ],
            fc1_expert_biases=_bias(layer, "gemm1_bias", x.dtype),
            fc2_expert_biases=_bias(layer, "gemm2_bias", x.dtype),
            tp_size=shape.tp_size,
            tp_rank=shape.tp_rank,
            ep_size=shape.ep_size,
            ep_rank=shape.ep_rank,
            activation_type=ActivationType.Swiglu if shape.expert_activation.gated else ActivationType.Relu2,
            swiglu_alpha=getattr(layer, "gemm1_alpha", None),
            swiglu_beta=getattr(layer, "gemm1_beta", None),
            swiglu_limit=getattr(layer, "gemm1_clamp_limit", None),
        )
        return out[0][:, : shape.hidden]  # type: ignore[no-any-return]


def _bias(layer: MoENames, name: str, dtype: torch.dtype) -> Tensor | None:
    bias: Tensor | None = getattr(layer, name, None)
    return None if bias is None else bias.to(dtype)


RUNNER = FlashInferCutlass()
