"""FlashInfer's ``mm_bf16_fp4``: quantized weights, activations as they are (W4A16).

``flashinfer/gemm/gemm_bf16_fp4.py`` ``mm_bf16_fp4``. Our kernel formats are what its ``prepare_bf16_fp4_weights`` returns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._base import KernelNames, LinearBackend, LinearShape


class MmBf16Fp4(LinearBackend):
    """A backend which is one of ``mm_bf16_fp4``'s. A subclass names it, its layout and its compute capabilities."""

    #: ``mm_bf16_fp4(backend=...)``.
    kernel: str
    weight_only = True
    needs_input_scale = False
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    packages: tuple[str, ...] = ("flashinfer",)
    call = "mm_bf16_fp4"

    def operands(self, layer: KernelNames, shape: LinearShape) -> tuple[Tensor, Tensor]:
        """(weight, scales) as the kernel takes them; views of the kernel names."""
        return layer.weight_prepared, layer.weight_scale_interleaved

    def apply(self, layer: KernelNames, x: Tensor, shape: LinearShape) -> Tensor:
        from flashinfer import mm_bf16_fp4

        weight, scales = self.operands(layer, shape)
        out: Tensor = mm_bf16_fp4(x, weight, scales, layer.weight_alpha, backend=self.kernel, out_dtype=x.dtype)
        return out
