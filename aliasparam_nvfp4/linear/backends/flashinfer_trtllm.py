"""``flashinfer_trtllm``: FlashInfer ``mm_fp4(backend="trtllm")``, compute capability 10.x, bfloat16 output."""

from __future__ import annotations

import torch

from ._layouts import SHUFFLED
from ._mm_fp4 import MmFp4


class FlashInferTrtllm(MmFp4):
    name = "flashinfer_trtllm"
    kernel = "trtllm"
    layout = SHUFFLED
    capabilities = frozenset({(10, 0), (10, 3), (10, 7)})
    dtypes = (torch.bfloat16,)
    rank = 10


BACKEND = FlashInferTrtllm()
