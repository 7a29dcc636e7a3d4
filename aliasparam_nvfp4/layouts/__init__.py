"""Kernel layouts: one line each, and the formats that are no order of bytes."""

from __future__ import annotations

from .lines import swizzle as swizzle
from .mma_view import mma_view as mma_view
from .s0e5m3 import S0E5M3 as S0E5M3
