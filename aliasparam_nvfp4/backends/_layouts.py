"""The kernel formats of linear layers that several backends share."""

from __future__ import annotations

from ..layouts import FRAGMENTS as FRAGMENT_ORDER
from ..layouts import S0E5M3, SWIZZLE_128X4
from ..layouts.lines import SAME, padded, shuffled
from ._base import LinearLayout

#: cutlass, cudnn, cute-dsl, b12x: rows in order, N % 32 == 0 and K % 32 == 0 by zeros (``fp4_gemm_cutlass.cu``,
#: ``fp4_bmm_impl``); block scales padded and swizzled to 128x4 tiles. Packed bytes hold two values: K % 32 is 16 bytes.
PLAIN = LinearLayout("plain", weight=padded(32, 16), weight_scale=SWIZZLE_128X4)

#: trtllm: rows padded to 128 and K to 64, rows shuffled for an epilogue tile of 128, scales alike and then swizzled
#: (FlashInfer ``shuffle_matrix_a``, ``shuffle_matrix_sf_a``).
SHUFFLED = LinearLayout("shuffled", weight=shuffled(32), weight_scale=shuffled(4).then(SWIZZLE_128X4))

#: W4A16 on cuDNN: the checkpoint's own bytes.
CHECKPOINT = LinearLayout("checkpoint", weight=SAME, weight_scale=SAME)

#: W4A16 by CuteDSL on compute capability 10.x: weights as they are, scales swizzled (and viewed in 6 dims at the call).
SWIZZLED = LinearLayout("swizzled", weight=SAME, weight_scale=SWIZZLE_128X4)

#: W4A16 by CuteDSL on compute capability 12.x, which knows no padding: N in whole tiles of 64.
FRAGMENTS = LinearLayout("fragments", weight=FRAGMENT_ORDER, weight_scale=S0E5M3, whole_rows=64, signed_scales=False)
