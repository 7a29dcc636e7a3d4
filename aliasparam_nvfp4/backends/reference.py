"""``reference``: plain torch on any device, reading the very bytes of the CUTLASS kernel format.

It computes what the kernel computes: activations quantized to NVFP4 with ``input_scale_inv``, codes times block scales
multiplied and summed in float32, ``alpha`` applied to the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import linear_from_kernel_format
from ._base import KernelNames, LinearBackend, LinearShape
from ._cutlass_layout import CUTLASS_LAYOUT


class Reference(LinearBackend):
    name = "reference"
    layout = CUTLASS_LAYOUT
    rank = 0

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def apply(self, layer: KernelNames, x: Tensor, shape: LinearShape) -> Tensor:
        return linear_from_kernel_format(
            x,
            layer.weight_prepared,
            layer.weight_scale_interleaved,
            layer.alpha,
            layer.input_scale_inv,
            n=shape.n,
            k=shape.k,
        )


BACKEND = Reference()
