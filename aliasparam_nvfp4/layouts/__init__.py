"""Kernel layouts: one line each, and the formats that are no order of bytes."""

from __future__ import annotations

from .lines import FRAGMENTS as FRAGMENTS
from .lines import SWIZZLE_128X4 as SWIZZLE_128X4
from .mma_view import mma_view as mma_view
from .s0e5m3 import S0E5M3 as S0E5M3
