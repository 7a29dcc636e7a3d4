"""``flashinfer_blackwell_native_w4a16``: FlashInfer ``mm_bf16_fp4(backend="blackwell-native")``, compute capability 10.0 and
10.3, built from source; reads the checkpoint's own bytes."""

from __future__ import annotations

from ._layouts import CHECKPOINT
from ._mm_bf16_fp4 import MmBf16Fp4


class FlashInferBlackwellNativeW4A16(MmBf16Fp4):
    name = "flashinfer_blackwell_native_w4a16"
    kernel = "blackwell-native"
    layout = CHECKPOINT
    capabilities = frozenset({(10, 0), (10, 3)})
    rank = 4


BACKEND = FlashInferBlackwellNativeW4A16()
