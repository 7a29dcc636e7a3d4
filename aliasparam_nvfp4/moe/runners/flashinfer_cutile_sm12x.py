"""``flashinfer_cutile_sm12x``: FlashInfer's cuTile W4A16 MoE on compute capability 12.x, with 128x4 block scales."""

from __future__ import annotations

from torch import Tensor

from ..layouts import GATE_UP
from ._cutile import CuTile


class FlashInferCuTileSm12x(CuTile):
    name = "flashinfer_cutile_sm12x"
    layout = GATE_UP
    capabilities = frozenset({(12, 0), (12, 1)})
    rank = 1

    def scale_view(self, scales: Tensor) -> Tensor:
        """``[E, R, C]`` as its tiles, ``[E, R/128, C/4, 32, 16]`` (``prepare.py``, ``_swizzle_cutile_fp4_scales``)."""
        experts, rows, columns = scales.shape
        return scales.view(experts, rows // 128, columns // 4, 32, 16)


RUNNER = FlashInferCuTileSm12x()
