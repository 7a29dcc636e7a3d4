"""``reference``: plain torch on any device, from the checkpoint's own bytes.

As the W4A4 kernels compute: the input quantized with ``w13_input_scale_quant``, float32 sums, the activation of true values in
float32, the result quantized with ``w2_input_scale_quant``, experts summed in float32 in the order of ``topk_ids``. Without
activation scales in the checkpoint neither is quantized; where some are missing and shall be computed at run time, both are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...quantize.codec import quantize_activation, scaled_codes
from ...quantize.missing import RunTimeScales
from ..biases import PLAIN
from ..layouts import CHECKPOINT
from ..scales import SwigluNumbers
from ._base import MoENames, MoERunner, MoEShape, own_biases


class Reference(MoERunner):
    name = "reference"
    layout = CHECKPOINT
    separate_scales = True
    activations = frozenset({"swiglu", "geglu", "relu2"})
    swiglu_numbers = SwigluNumbers.AS_FLOATS
    needs_input_scale = False
    dynamic_scales = True
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    biases = PLAIN
    call = "torch"

    def apply(self, layer: MoENames, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shape: MoEShape) -> Tensor:
        quant2 = getattr(layer, "w2_input_scale_quant", None)
        run_time, (bias13, bias2) = layer.run_time_scales, own_biases(layer, shape)
        rows = x.float() if quant2 is None else quantized(x, layer.w13_input_scale_quant, run_time)
        # g1_scale_c is the up factor over a2 (times 1 for weights alone, and where a2 is computed here).
        up_factor = layer.g1_scale_c if quant2 is None else layer.g1_scale_c / torch.where(quant2 > 0, quant2, 1.0)
        each = torch.zeros(*topk_ids.shape, shape.hidden, device=x.device)
        for expert in range(shape.experts):
            token, choice = (topk_ids == shape.first_expert + expert).nonzero(as_tuple=True)
            if not token.numel():
                continue
            w13 = scaled_codes(layer.w13_weight_prepared[expert], layer.w13_blockscale_swizzled[expert])
            sums = rows[token] @ w13.T
            if shape.expert_activation.gated:
                gate, up = sums.chunk(2, -1)
                bias1, bias_up = (0.0, 0.0) if bias13 is None else bias13[expert].float().chunk(2)
                hidden = shape.expert_activation(gate * layer.g1_alphas[expert] + bias1, up * up_factor[expert] + bias_up)
            else:
                bias1 = 0.0 if bias13 is None else bias13[expert].float()
                hidden = shape.expert_activation(sums * layer.g1_alphas[expert] + bias1, None)
            if quant2 is not None:
                hidden = quantized(hidden, quant2, run_time)
            w2 = scaled_codes(layer.w2_weight_prepared[expert], layer.w2_blockscale_swizzled[expert])
            out = (hidden @ w2.T) * layer.g2_alphas[expert]
            each[token, choice] = out if bias2 is None else out + bias2[expert].float()
        return (each * topk_weights.float().unsqueeze(-1)).sum(1).to(x.dtype)


def quantized(x: Tensor, stored: Tensor, run_time: RunTimeScales | None) -> Tensor:
    """Activations as the codes and block scales say, without the global scale; with it where it is computed here."""
    if run_time is None:
        return scaled_codes(*quantize_activation(x, stored))
    inverse = run_time.inverse(x, stored)
    return scaled_codes(*quantize_activation(x, inverse)) * torch.where(stored > 0, 1.0, 1.0 / inverse)


RUNNER = Reference()
