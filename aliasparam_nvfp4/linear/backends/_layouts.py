"""The kernel formats of linear layers that several backends share."""

from __future__ import annotations

from aliasparam import Layout

from ...layouts import S0E5M3, lines
from ._base import LinearLayout

_SAME = Layout.identity(2)

#: cutlass, cudnn, cute-dsl, b12x: rows in order, N % 32 == 0 and K % 32 == 0 by zeros (``fp4_gemm_cutlass.cu``,
#: ``fp4_bmm_impl``); block scales padded and swizzled to 128x4 tiles. Packed bytes hold two values: K % 32 is 16 bytes.
PLAIN = LinearLayout("plain", weight=lines.pad(32, 16), weight_scale=lines.swizzle())

#: trtllm: rows padded to 128 and K to 64, rows shuffled for an epilogue tile of 128, scales alike and then swizzled
#: (FlashInfer ``shuffle_matrix_a``, ``shuffle_matrix_sf_a``).
SHUFFLED = LinearLayout("shuffled", weight=lines.shuffle(32, rows=128), weight_scale=lines.shuffle_swizzled())

#: W4A16 on cuDNN: the checkpoint's own bytes.
CHECKPOINT = LinearLayout("checkpoint", weight=_SAME, weight_scale=_SAME)

#: W4A16 by CuteDSL on compute capability 10.x: weights as they are, scales swizzled (and viewed in 6 dims at the call).
SWIZZLED = LinearLayout("swizzled", weight=_SAME, weight_scale=lines.swizzle())

#: W4A16 by CuteDSL on compute capability 12.x, which knows no padding: N in whole tiles of 64.
FRAGMENTS = LinearLayout("fragments", weight=lines.fragments(), weight_scale=S0E5M3, whole_rows=64, signed_scales=False)
