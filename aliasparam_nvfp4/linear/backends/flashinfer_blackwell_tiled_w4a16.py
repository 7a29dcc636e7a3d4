"""``flashinfer_blackwell_tiled_w4a16``: FlashInfer ``mm_bf16_fp4(backend="blackwell-tiled")``, compute capability 10.0 and
10.3, built from source; reads the MMA fragments of compute capability 12.x. N a multiple of 64."""

from __future__ import annotations

import torch
from torch import Tensor

from ._base import KernelNames, LinearShape
from ._layouts import FRAGMENTS
from ._mm_bf16_fp4 import MmBf16Fp4


class FlashInferBlackwellTiledW4A16(MmBf16Fp4):
    name = "flashinfer_blackwell_tiled_w4a16"
    kernel = "blackwell-tiled"
    layout = FRAGMENTS
    capabilities = frozenset({(10, 0), (10, 3)})
    rank = 3

    def operands(self, layer: KernelNames, shape: LinearShape) -> tuple[Tensor, Tensor]:
        return layer.weight_prepared.view(torch.int32), layer.weight_scale_interleaved


BACKEND = FlashInferBlackwellTiledW4A16()
