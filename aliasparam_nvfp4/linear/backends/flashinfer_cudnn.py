"""``flashinfer_cudnn``: FlashInfer ``mm_fp4(backend="cudnn")``, compute capability 10.x, 11.0 and 12.x."""

from __future__ import annotations

from ._layouts import PLAIN
from ._mm_fp4 import MmFp4


class FlashInferCudnn(MmFp4):
    name = "flashinfer_cudnn"
    kernel = "cudnn"
    layout = PLAIN
    capabilities = frozenset({(10, 0), (10, 3), (10, 7), (11, 0), (12, 0), (12, 1)})
    packages = ("flashinfer", "cudnn")
    rank = 20


BACKEND = FlashInferCudnn()
