"""``flashinfer_cudnn_w4a16``: FlashInfer ``mm_bf16_fp4(backend="cudnn")``; reads the checkpoint's own bytes."""

from __future__ import annotations

from ._layouts import CHECKPOINT
from ._mm_bf16_fp4 import MmBf16Fp4


class FlashInferCudnnW4A16(MmBf16Fp4):
    name = "flashinfer_cudnn_w4a16"
    kernel = "cudnn"
    layout = CHECKPOINT
    capabilities = frozenset({(10, 0), (10, 3), (10, 7), (11, 0), (12, 0), (12, 1)})
    packages = ("flashinfer", "cudnn")
    rank = 5


BACKEND = FlashInferCudnnW4A16()
