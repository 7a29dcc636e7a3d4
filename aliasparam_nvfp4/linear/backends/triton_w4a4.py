"""``triton_w4a4``: the numbers of a W4A4 kernel on GPUs which have none. For accuracy checks, not for speed.

Activations are quantized as FlashInfer's quantizer does it and given back to the W4A16 kernel: a code times its block scale has
six significant bits, so bf16 and fp16 hold it exactly, and ``alpha`` carries both global scales. Scales which are computed at
run time are multiplied into the result, which is rounded once more; the kernel then works in bf16, whose range holds the sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._base import KernelNames, LinearShape, quantizer_scales
from .triton import Triton, kernel_input


class TritonW4A4(Triton):
    name = "triton_w4a4"
    weight_only = False
    needs_input_scale = True
    dynamic_scales = True
    rank = -1

    def apply(self, layer: KernelNames, x: Tensor, shape: LinearShape) -> Tensor:
        from ...kernels.triton_linear import linear
        from ...quantize.codec import quantize_activation, scaled_codes

        inverse, alpha = quantizer_scales(layer, x)
        codes = scaled_codes(*quantize_activation(kernel_input(x), inverse))
        if layer.run_time_scales is None:
            return linear(codes.to(x.dtype), layer.weight_prepared, layer.weight_scale_interleaved, alpha, n=shape.n)
        one = torch.ones_like(layer.weight_alpha)
        sums = linear(codes.to(torch.bfloat16), layer.weight_prepared, layer.weight_scale_interleaved, one, n=shape.n)
        return (sums.float() * alpha).to(x.dtype)


BACKEND = TritonW4A4()
