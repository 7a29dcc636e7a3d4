"""``flashinfer_cutedsl_w4a16_sm12x``: FlashInfer ``mm_bf16_fp4(backend="cute-dsl")`` on compute capability 12.x.

Its scales are re-encoded without their sign, so they have memory of their own beside the checkpoint's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._base import KernelNames, LinearShape
from ._layouts import FRAGMENTS
from ._mm_bf16_fp4 import MmBf16Fp4


class FlashInferCuteDslW4A16Sm12x(MmBf16Fp4):
    name = "flashinfer_cutedsl_w4a16_sm12x"
    kernel = "cute-dsl"
    layout = FRAGMENTS
    capabilities = frozenset({(12, 0), (12, 1)})
    packages = ("flashinfer", "cutlass")
    rank = 6

    def operands(self, layer: KernelNames, shape: LinearShape) -> tuple[Tensor, Tensor]:
        return layer.weight_prepared.view(torch.int32), layer.weight_scale_interleaved


BACKEND = FlashInferCuteDslW4A16Sm12x()
