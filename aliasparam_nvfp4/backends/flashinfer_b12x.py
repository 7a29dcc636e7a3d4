"""``flashinfer_b12x``: FlashInfer ``mm_fp4(backend="b12x")``, compute capability 12.x, CUDA 12.9 or later."""

from __future__ import annotations

import sys

from ._layouts import PLAIN
from ._mm_fp4 import MmFp4

#: Modules of FlashInfer that keep weights by address (not contents), and the function which forgets them.
_CACHES = (
    "flashinfer.fused_moe.cute_dsl.blackwell_sm12x.moe_dispatch",
    "flashinfer.experimental.b12x.moe.fused_moe._impl",
)


class FlashInferB12x(MmFp4):
    name = "flashinfer_b12x"
    kernel = "b12x"
    layout = PLAIN
    capabilities = frozenset({(12, 0), (12, 1)})
    packages = ("flashinfer", "cutlass")
    rank = 35

    def weights_changed(self) -> None:
        """Its MoE kernels look prepared weights up by address; after a reload the address is the same and the bytes are not."""
        for name in _CACHES:
            module = sys.modules.get(name)  # not imported: nothing is cached
            for cache in ("_WEIGHT_CACHE", "_PADDED_WEIGHT_CACHE", "_W4A16_WEIGHT_CACHE"):
                getattr(module, cache, {}).clear()


BACKEND = FlashInferB12x()
