"""Block scales without a sign, as FlashInfer's W4A16 GEMM for compute capability 12.x reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from aliasparam import Reencoding, TensorSpec

from ..quantize.block_scales import need_block_scales


def scales_to_s0e5m3(scales: Tensor) -> Tensor:
    """Block scales e4m3 ``[..., N, K/16]`` to u8 ``[..., K/16, N]``: the high bits of the float16 value without its sign.

    FlashInfer ``gemm_bf16_fp4_cute_dsl.py``, ``_e4m3_to_s0e5m3``. Negative scales are refused: it would make them positive.

    Raises:
        ScaleError: negative scales, or NaN.
    """
    need_block_scales(scales, signed=False)
    bits = scales.to(torch.float16).view(torch.int16).int()
    return ((bits >> 7) & 0xFF).to(torch.uint8).transpose(-1, -2).contiguous()


def _s0e5m3(spec: TensorSpec) -> TensorSpec:
    return TensorSpec((*spec.shape[:-2], spec.shape[-1], spec.shape[-2]), torch.uint8)


#: The sign is dropped, so this is no order of the checkpoint's bytes: the source is kept, and the kernel name has its own memory.
S0E5M3 = Reencoding(scales_to_s0e5m3, _s0e5m3)
