"""``flashinfer_cutedsl``: FlashInfer ``mm_fp4(backend="cute-dsl")``, compute capability 10.x.

The kernel exists for 12.x too, with narrower dims (K % 64, N % 64) and unpadded scales; there ``flashinfer_b12x`` serves.
"""

from __future__ import annotations

from ._layouts import PLAIN
from ._mm_fp4 import MmFp4


class FlashInferCuteDsl(MmFp4):
    name = "flashinfer_cutedsl"
    kernel = "cute-dsl"
    layout = PLAIN
    capabilities = frozenset({(10, 0), (10, 3), (10, 7)})
    packages = ("flashinfer", "cutlass")
    rank = 25


BACKEND = FlashInferCuteDsl()
