"""Kernel layouts, one bijection a file."""

from __future__ import annotations

from .shuffle_rows import ShuffleRows as ShuffleRows
from .swizzle_128x4 import Swizzle128x4 as Swizzle128x4
