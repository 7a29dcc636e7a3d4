"""The kernel formats of linear layers that several backends share."""

from __future__ import annotations

from aliasparam import Identity, PadLast2

from ..layouts import PackFragments, ScalesToS0E5M3, ShuffleRows, Swizzle128x4
from ._base import LinearLayout

#: cutlass, cudnn, cute-dsl, b12x: rows in order, N % 32 == 0 and K % 32 == 0 by zeros (``fp4_gemm_cutlass.cu``,
#: ``fp4_bmm_impl``); block scales padded and swizzled to 128x4 tiles. Packed bytes hold two values: K % 32 is 16 bytes.
PLAIN = LinearLayout("plain", weight=PadLast2(rows=32, cols=16), weight_scale=Swizzle128x4())

#: trtllm: rows padded to 128 and K to 64, rows shuffled for an epilogue tile of 128, scales alike and then swizzled
#: (FlashInfer ``shuffle_matrix_a``, ``shuffle_matrix_sf_a``).
SHUFFLED = LinearLayout(
    "shuffled",
    weight=PadLast2(rows=128, cols=32).then(ShuffleRows(128)),
    weight_scale=PadLast2(rows=128, cols=4).then(ShuffleRows(128)).then(Swizzle128x4()),
)

#: W4A16 on cuDNN: the checkpoint's own bytes.
CHECKPOINT = LinearLayout("checkpoint", weight=Identity(), weight_scale=Identity())

#: W4A16 by CuteDSL on compute capability 10.x: weights as they are, scales swizzled (and viewed in 6 dims at the call).
SWIZZLED = LinearLayout("swizzled", weight=Identity(), weight_scale=Swizzle128x4())

#: W4A16 by CuteDSL on compute capability 12.x.
FRAGMENTS = LinearLayout("fragments", weight=PackFragments(), weight_scale=ScalesToS0E5M3(), signed_scales=False)
