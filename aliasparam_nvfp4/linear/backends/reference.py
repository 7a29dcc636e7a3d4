"""``reference``: plain torch on any device, reading the very bytes of the plain kernel format.

It computes what the kernels compute: activations quantized to NVFP4 with ``input_scale_inv``, codes times block scales
multiplied and summed in float32, ``alpha`` applied to the sum. Without an input scale (W4A16 checkpoints) activations stay,
unless their scales are to be computed at run time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import kernel_weight, linear_from_kernel_format
from ._base import KernelNames, LinearBackend, LinearShape, quantizer_scales
from ._layouts import PLAIN


class Reference(LinearBackend):
    name = "reference"
    layout = PLAIN
    needs_input_scale = False
    dynamic_scales = True
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    rank = 0
    call = "aliasparam_nvfp4.linear.reference"

    def apply(self, layer: KernelNames, x: Tensor, shape: LinearShape) -> Tensor:
        weight, scales = layer.weight_prepared, layer.weight_scale_interleaved
        if layer.run_time_scales is None and getattr(layer, "input_scale_inv", None) is None:
            return (x.float() @ kernel_weight(weight, scales, n=shape.n, k=shape.k).T * layer.weight_alpha).to(x.dtype)
        inverse, alpha = quantizer_scales(layer, x)
        return linear_from_kernel_format(x, weight, scales, alpha, inverse, n=shape.n, k=shape.k)


BACKEND = Reference()
