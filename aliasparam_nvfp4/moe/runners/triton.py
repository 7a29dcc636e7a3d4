"""``triton``: our fused W4A16 experts, which decode weights in registers. Compute capability 8.0 on."""

from __future__ import annotations

import torch
from torch import Tensor

from ...linear.backends.triton import kernel_input, no_triton
from ..biases import PLAIN
from ..layouts import GATE_UP
from ..scales import InputScales, SwigluNumbers
from ._base import MoENames, MoERunner, MoEShape, own_biases


class Triton(MoERunner):
    name = "triton"
    layout = GATE_UP
    input_scales = InputScales.NONE
    separate_scales = True
    biases = PLAIN
    activations = frozenset({"swiglu", "relu2"})
    swiglu_numbers = SwigluNumbers.AS_FLOATS
    packages = ("triton",)
    dtypes = (torch.bfloat16, torch.float16)
    rank = 2
    call = "aliasparam_nvfp4.kernels.triton_moe.experts"

    def unavailable(self, device: torch.device) -> str | None:
        return super().unavailable(device) or no_triton(device)

    def apply(self, layer: MoENames, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shape: MoEShape) -> Tensor:
        from ...kernels.triton_moe import ExpertWeights, experts

        bias13, bias2 = own_biases(layer, shape)
        weights = ExpertWeights(
            w13=layer.w13_weight_prepared,
            w13_scale=layer.w13_blockscale_swizzled,
            w2=layer.w2_weight_prepared,
            w2_scale=layer.w2_blockscale_swizzled,
            gate=layer.g1_alphas,
            up=layer.g1_scale_c,
            down=layer.g2_alphas,
            first_expert=shape.first_expert,
            bias13=bias13,
            bias2=bias2,
        )
        return experts(
            kernel_input(x),
            weights,
            topk_weights,
            topk_ids.to(torch.int32),
            intermediate=shape.intermediate,
            activation=shape.expert_activation,
        )


RUNNER = Triton()
