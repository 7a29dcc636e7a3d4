"""Kernel layouts, one bijection a file."""

from __future__ import annotations

from .gate_up import UP_GATE as UP_GATE
from .gate_up import up_gate_blocks as up_gate_blocks
from .gate_up import up_gate_shuffled as up_gate_shuffled
from .mma_view import mma_view as mma_view
from .pad_halves import PadHalves as PadHalves
from .shuffle_rows import ShuffleRows as ShuffleRows
from .sm12x import PackFragments as PackFragments
from .sm12x import ScalesToS0E5M3 as ScalesToS0E5M3
from .swizzle_8x4 import Swizzle8x4 as Swizzle8x4
from .swizzle_128x4 import Swizzle128x4 as Swizzle128x4
