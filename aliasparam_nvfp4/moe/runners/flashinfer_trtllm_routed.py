"""``flashinfer_trtllm_routed``: FlashInfer ``trtllm_fp4_block_scale_routed_moe``, compute capability 10.x."""

from __future__ import annotations

from ._trtllm import TrtLlm


class FlashInferTrtllmRouted(TrtLlm):
    name = "flashinfer_trtllm_routed"
    rank = 30
    call = "trtllm_fp4_block_scale_routed_moe"


RUNNER = FlashInferTrtllmRouted()
