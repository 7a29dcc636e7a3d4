"""``flashinfer_cutedsl_low_latency``: FlashInfer ``mm_fp4(backend="cutedsl_low_latency")`` for up to 8 tokens, compute
capability 10.x; ``cute-dsl``, which reads the same format, for more tokens or where K is not a multiple of 64."""

from __future__ import annotations

from ._layouts import PLAIN
from ._mm_fp4 import MmFp4


class FlashInferCuteDslLowLatency(MmFp4):
    name = "flashinfer_cutedsl_low_latency"
    kernel = "cutedsl_low_latency"
    layout = PLAIN
    capabilities = frozenset({(10, 0), (10, 3), (10, 7)})
    packages = ("flashinfer", "cutlass")
    rank = 15

    def kernel_for(self, tokens: int, padded_k: int) -> str:
        return self.kernel if tokens <= 8 and padded_k % 64 == 0 else "cute-dsl"


BACKEND = FlashInferCuteDslLowLatency()
