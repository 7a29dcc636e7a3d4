"""``flashinfer_b12x``: FlashInfer ``mm_fp4(backend="b12x")``, compute capability 12.x, CUDA 12.9 or later."""

from __future__ import annotations

from ._layouts import PLAIN
from ._mm_fp4 import MmFp4


class FlashInferB12x(MmFp4):
    name = "flashinfer_b12x"
    kernel = "b12x"
    layout = PLAIN
    capabilities = frozenset({(12, 0), (12, 1)})
    packages = ("flashinfer", "cutlass")
    rank = 35


BACKEND = FlashInferB12x()
