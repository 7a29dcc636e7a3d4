"""``flashinfer_cutlass``: FlashInfer ``mm_fp4(backend="cutlass")``, compute capability 10.x, 11.0 and 12.x.

Signature: ``flashinfer/gemm/gemm_base.py`` ``mm_fp4``; activations: ``flashinfer/quantization/fp4_quantization.py``
``fp4_quantize`` with global scale ``1 / input_scale``.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor
from torch.nn import functional

from ._base import KernelNames, LinearBackend, LinearShape
from ._cutlass_layout import CUTLASS_LAYOUT

_CAPABILITIES = frozenset({(10, 0), (10, 3), (10, 7), (11, 0), (12, 0), (12, 1)})


class FlashInferCutlass(LinearBackend):
    name = "flashinfer_cutlass"
    layout = CUTLASS_LAYOUT
    rank = 20

    def unavailable(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "needs a Blackwell GPU"
        capability = torch.cuda.get_device_capability(device)
        if capability not in _CAPABILITIES:
            return f"needs a Blackwell GPU, this one has compute capability {capability[0]}.{capability[1]}"
        if importlib.util.find_spec("flashinfer") is None:
            return "flashinfer-python is not installed"
        return None

    def apply(self, layer: KernelNames, x: Tensor, shape: LinearShape) -> Tensor:
        from flashinfer import fp4_quantize, mm_fp4

        rows = x.reshape(-1, shape.k)
        if rows.shape[0] == 0:
            return x.new_empty((*x.shape[:-1], shape.n))
        padded_k = 2 * layer.weight_prepared.shape[1]
        if padded_k != shape.k:
            rows = functional.pad(rows, (0, padded_k - shape.k))
        codes, block_scales = fp4_quantize(rows, layer.input_scale_inv)
        out: Tensor = mm_fp4(
            codes,
            layer.weight_prepared.T,
            block_scales,
            layer.weight_scale_interleaved.T,
            layer.alpha,
            x.dtype,
            backend="cutlass",
        )
        return out[:, : shape.n].reshape(*x.shape[:-1], shape.n)


BACKEND = FlashInferCutlass()
