"""``flashinfer_cutedsl_w4a16``: FlashInfer ``mm_bf16_fp4(backend="cute-dsl")`` on compute capability 10.x."""

from __future__ import annotations

from torch import Tensor

from ...layouts import mma_view
from ...quantize.format import BLOCK_SIZE
from ._base import KernelNames, LinearShape
from ._layouts import SWIZZLED
from ._mm_bf16_fp4 import MmBf16Fp4


class FlashInferCuteDslW4A16(MmBf16Fp4):
    name = "flashinfer_cutedsl_w4a16"
    kernel = "cute-dsl"
    layout = SWIZZLED
    capabilities = frozenset({(10, 0), (10, 3), (10, 7)})
    packages = ("flashinfer", "cutlass")
    rank = 6

    def operands(self, layer: KernelNames, shape: LinearShape) -> tuple[Tensor, Tensor]:
        return layer.weight_prepared, mma_view(layer.weight_scale_interleaved, shape.n, shape.k // BLOCK_SIZE)


BACKEND = FlashInferCuteDslW4A16()
