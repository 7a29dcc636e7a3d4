"""The kernel format shared by FlashInfer's cutlass, cudnn, cute-dsl and b12x paths.

Packed weight rows in order, padded to N % 32 == 0 and K % 32 == 0 (``fp4_gemm_cutlass.cu``, ``fp4_bmm_impl``); block scales
padded and swizzled to 128x4 tiles (``fp4Op.cpp``, ``computeSFIndex``).
"""

from __future__ import annotations

from aliasparam import PadLast2

from ..layouts import Swizzle128x4
from ._base import LinearLayout

#: Packed bytes hold two values, so K % 32 == 0 is 16 bytes.
CUTLASS_LAYOUT = LinearLayout(weight=PadLast2(rows=32, cols=16), weight_scale=Swizzle128x4())
