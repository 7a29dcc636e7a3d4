"""``triton_w4a4``: the numbers of a W4A4 kernel on GPUs which have none. For accuracy checks, not for speed.

Activations are quantized as FlashInfer's quantizer does it and given back to the W4A16 kernel: a code times its block scale has
six significant bits, so bf16 and fp16 hold it exactly, and ``alpha`` carries both global scales.
"""

from __future__ import annotations

from torch import Tensor

from ._base import KernelNames, LinearShape
from .triton import Triton, kernel_input


class TritonW4A4(Triton):
    name = "triton_w4a4"
    weight_only = False
    needs_input_scale = True
    rank = -1

    def apply(self, layer: KernelNames, x: Tensor, shape: LinearShape) -> Tensor:
        from ..codec import quantize_activation, scaled_codes
        from ..kernels.triton_linear import linear

        codes = scaled_codes(*quantize_activation(kernel_input(x), layer.input_scale_inv)).to(x.dtype)
        return linear(codes, layer.weight_prepared, layer.weight_scale_interleaved, layer.alpha, n=shape.n)


BACKEND = TritonW4A4()
