"""``reference``: plain torch on any device, from the checkpoint's own bytes.

As the W4A4 kernels compute: the input quantized with ``w13_input_scale_quant``, float32 sums, the activation of true values in
float32, the result quantized with ``w2_input_scale_quant``, experts summed in float32 in the order of ``topk_ids``. Without
activation scales in the checkpoint neither is quantized.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...codec import quantize_activation, scaled_codes
from ..layouts import CHECKPOINT
from ..scales import SwigluNumbers
from ._base import MoENames, MoERunner, MoEShape


class Reference(MoERunner):
    name = "reference"
    layout = CHECKPOINT
    separate_scales = True
    activations = frozenset({"swiglu", "geglu", "relu2"})
    swiglu_numbers = SwigluNumbers.AS_FLOATS
    needs_input_scale = False
    call = "torch"

    def apply(self, layer: MoENames, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shape: MoEShape) -> Tensor:
        quant2 = getattr(layer, "w2_input_scale_quant", None)
        rows = x.float() if quant2 is None else _quantized(x, layer.w13_input_scale_quant)
        # g1_scale_c is the up factor over a2 (times 1 for weights alone).
        up_factor = layer.g1_scale_c if quant2 is None else layer.g1_scale_c / quant2
        each = torch.zeros(*topk_ids.shape, shape.hidden, device=x.device)
        for expert in range(shape.experts):
            token, choice = (topk_ids == shape.first_expert + expert).nonzero(as_tuple=True)
            if not token.numel():
                continue
            w13 = scaled_codes(layer.w13_weight_prepared[expert], layer.w13_blockscale_swizzled[expert])
            sums = rows[token] @ w13.T
            if shape.expert_activation.gated:
                gate, up = sums.chunk(2, -1)
                hidden = shape.expert_activation(gate * layer.g1_alphas[expert], up * up_factor[expert])
            else:
                hidden = shape.expert_activation(sums * layer.g1_alphas[expert], None)
            if quant2 is not None:
                hidden = _quantized(hidden, quant2)
            w2 = scaled_codes(layer.w2_weight_prepared[expert], layer.w2_blockscale_swizzled[expert])
            each[token, choice] = (hidden @ w2.T) * layer.g2_alphas[expert]
        return (each * topk_weights.float().unsqueeze(-1)).sum(1).to(x.dtype)


def _quantized(x: Tensor, scale_inv: Tensor) -> Tensor:
    """Activations as the codes and block scales say, without the global scale."""
    return scaled_codes(*quantize_activation(x, scale_inv))


RUNNER = Reference()
