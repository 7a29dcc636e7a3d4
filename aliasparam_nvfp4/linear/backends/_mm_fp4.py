"""FlashInfer's ``mm_fp4``: one call, several kernels.

``flashinfer/gemm/gemm_base.py`` ``mm_fp4``; activations by ``flashinfer/quantization/fp4_quantization.py`` ``fp4_quantize``
with global scale ``1 / input_scale``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ._base import KernelNames, LinearBackend, LinearShape


class MmFp4(LinearBackend):
    """A backend which is one of ``mm_fp4``'s. A subclass names it, its layout and its compute capabilities."""

    #: ``mm_fp4(backend=...)``.
    kernel: str
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    packages: tuple[str, ...] = ("flashinfer",)
    call = "mm_fp4"

    def kernel_for(self, tokens: int, padded_k: int) -> str:
        """The kernel for this many rows; a subclass may take another one."""
        return self.kernel

    def apply(self, layer: KernelNames, x: Tensor, shape: LinearShape) -> Tensor:
        from flashinfer import fp4_quantize, mm_fp4

        padded_k = 2 * layer.weight_prepared.shape[1]
        if padded_k != shape.k:
            x = functional.pad(x, (0, padded_k - shape.k))
        # None: no "4 over 6" search, whatever FLASHINFER_NVFP4_4OVER6 says; input_scale is that of plain NVFP4.
        codes, block_scales = fp4_quantize(x, layer.input_scale_inv, nvfp4_4over6=None)
        out: Tensor = mm_fp4(
            codes,
            layer.weight_prepared.T,
            block_scales,
            layer.weight_scale_interleaved.T,
            layer.alpha,
            x.dtype,
            backend=self.kernel_for(x.shape[0], padded_k),
        )
        return out[:, : shape.n]
