"""``flashinfer_cutile``: FlashInfer's cuTile W4A16 MoE on Ada and Hopper, compute capability 8.9 and 9.0.

Block scales stay row-major there (``flashinfer/fused_moe/prepare.py``, ``_prepare_cutile_fp4_scales``).
"""

from __future__ import annotations

from torch import Tensor

from ..layouts import ROW_MAJOR_64
from ._cutile import CuTile


class FlashInferCuTile(CuTile):
    name = "flashinfer_cutile"
    layout = ROW_MAJOR_64
    capabilities = frozenset({(8, 9), (9, 0)})
    rank = 1

    def scale_view(self, scales: Tensor) -> Tensor:
        return scales


RUNNER = FlashInferCuTile()
