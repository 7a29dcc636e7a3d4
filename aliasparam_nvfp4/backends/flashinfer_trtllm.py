"""``flashinfer_trtllm``: FlashInfer ``mm_fp4(backend="trtllm")``, compute capability 10.x, bfloat16 output."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ShapeError
from ._base import KernelNames, LinearShape
from ._layouts import SHUFFLED
from ._mm_fp4 import MmFp4


class FlashInferTrtllm(MmFp4):
    name = "flashinfer_trtllm"
    kernel = "trtllm"
    layout = SHUFFLED
    capabilities = frozenset({(10, 0), (10, 3), (10, 7)})
    rank = 10

    def apply(self, layer: KernelNames, x: Tensor, shape: LinearShape) -> Tensor:
        if x.dtype is not torch.bfloat16:
            raise ShapeError("this kernel writes bfloat16 alone", name=self.name, expected=torch.bfloat16, found=x.dtype)
        return super().apply(layer, x, shape)


BACKEND = FlashInferTrtllm()
