"""What the two TRT-LLM runners share: the kernel's arguments, and the call with a choice made before it.

Gate and up have a factor each, so their scales may differ. The kernel computes ``silu(gate * output1_scale_gate_scalar) *
(up * output1_scale_scalar)``, which is the activation over ``a2``, and quantizes that with global scale 1. Its clamp limit is one
for both sums, so with a limit different ones are refused. Biases are added to the sums before all that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..biases import SHUFFLED_RAW
from ..layouts import SHUFFLED
from ..scales import SwigluNumbers
from ._base import MoENames, MoERunner, MoEShape, own_biases, padded_input, quantized_input


class TrtLlm(MoERunner):
    layout = SHUFFLED
    separate_scales = True
    activations = frozenset({"swiglu", "relu2"})
    swiglu_numbers = SwigluNumbers.OF_RAW_SUMS
    biases = SHUFFLED_RAW
    capabilities = frozenset({(10, 0), (10, 3), (10, 7)})
    packages = ("flashinfer",)
    dtypes = (torch.bfloat16, torch.float16)

    def apply(self, layer: MoENames, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shape: MoEShape) -> Tensor:
        """The choice is packed: expert number in the high 16 bits, the bits of the bfloat16 weight in the low ones."""
        from flashinfer.fused_moe import trtllm_fp4_block_scale_routed_moe

        self.check_activation(shape.expert_activation)
        (out,) = trtllm_fp4_block_scale_routed_moe(
            topk_ids=pack_choices(topk_ids, topk_weights),
            routing_bias=None,
            top_k=topk_ids.shape[1],
            n_group=None,
            topk_group=None,
            routed_scaling_factor=None,
            routing_method_type=1,  # not looked at, but checked
            **self.arguments(layer, x, shape),
        )
        return out[:, : shape.hidden].to(x.dtype)  # type: ignore[no-any-return]

    def arguments(self, layer: MoENames, x: Tensor, shape: MoEShape) -> dict[str, Any]:
        """What both entry points take alike."""
        from flashinfer.tllm_enums import ActivationType, SfLayout

        codes, scales = quantized_input(padded_input(x, shape, self.layout), layer)
        _, intermediate = shape.padded(self.layout)
        bias13, bias2 = own_biases(layer, shape, "_raw")
        return {
            "hidden_states": codes,
            "hidden_states_scale": scales,
            "hidden_states_scale_layout": SfLayout.layout_linear,
            "gemm1_weights": layer.w13_weight_prepared,
            "gemm1_weights_scale": layer.w13_blockscale_swizzled,
            "gemm1_bias": bias13,
            "gemm1_alpha": getattr(layer, "gemm1_alpha", None),
            "gemm1_beta": getattr(layer, "gemm1_beta", None),
            "gemm1_clamp_limit": getattr(layer, "gemm1_clamp_limit", None),
            "gemm2_weights": layer.w2_weight_prepared,
            "gemm2_weights_scale": layer.w2_blockscale_swizzled,
            "gemm2_bias": bias2,
            "output1_scale_scalar": layer.g1_scale_c,
            "output1_scale_gate_scalar": layer.g1_alphas,
            "output2_scale_scalar": layer.g2_alphas,
            "num_experts": shape.all_experts,
            "intermediate_size": intermediate,
            "local_expert_offset": shape.first_expert,
            "local_num_experts": shape.experts,
            "activation_type": int(ActivationType.Swiglu if shape.expert_activation.gated else ActivationType.Relu2),
        }


def pack_choices(topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """int32 ``[T, k]``: ``expert << 16 | bits of bfloat16(weight)`` (``flashinfer/fused_moe/core.py``)."""
    bits = topk_weights.to(torch.bfloat16).view(torch.int16).to(torch.int32) & 0xFFFF
    return (topk_ids.to(torch.int32) << 16) | bits
