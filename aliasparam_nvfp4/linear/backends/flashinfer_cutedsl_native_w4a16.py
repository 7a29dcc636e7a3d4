"""``flashinfer_cutedsl_native_w4a16``: FlashInfer ``mm_bf16_fp4(backend="cute-dsl-native")``, compute capability 12.x: packed
weights as they are and the 128x4-swizzled scales, where ``cute-dsl`` wants both re-encoded."""

from __future__ import annotations

from ...errors import ShapeError
from ._base import LinearShape
from ._layouts import SWIZZLED
from ._mm_bf16_fp4 import MmBf16Fp4


class FlashInferCuteDslNativeW4A16(MmBf16Fp4):
    name = "flashinfer_cutedsl_native_w4a16"
    kernel = "cute-dsl-native"
    layout = SWIZZLED
    capabilities = frozenset({(12, 0), (12, 1)})
    packages = ("flashinfer", "cutlass")
    rank = 4

    def check_shape(self, shape: LinearShape) -> None:
        """Indices are 32 bits wide (``native_bf16_fp4/support.py``, ``check_weights``)."""
        super().check_shape(shape)
        if shape.n * shape.k >= 2**31:
            raise ShapeError("this kernel's indices do not reach so far", name=self.name, expected="N*K < 2^31", found=shape)


BACKEND = FlashInferCuteDslNativeW4A16()
