"""W4A16 GEMM and GEMV from the bytes of the CUTLASS (or TRT-LLM) kernel format: `out = x @ dequantized weight.T * alpha`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm import partial_sums


def linear(x: Tensor, weight: Tensor, scale: Tensor, alpha: Tensor, *, n: int, shuffled: bool = False) -> Tensor:
    """``[M, K] -> [M, n]`` in ``x.dtype``, from kernel-format bytes.

    Args:
        x: bf16 or fp16 ``[M, K]``, contiguous; K a multiple of 16.
        weight: u8 ``[>= n, >= K/2]`` packed codes, in row order or shuffled (``layouts.lines.shuffled``).
        scale: e4m3 ``[ceil(n/128)*128, P]``, 128x4-swizzled, rows in the order of ``weight``.
        alpha: f32 ``[1]``.
        n: logical output features.
        shuffled: whether rows are in TRT-LLM's order.

    Deterministic, allocates only its result and partial sums, and looks at no value on the host: safe in CUDA graphs.
    """
    parts = partial_sums(x, weight, scale, n=n, alpha=alpha, shuffled=shuffled)
    if parts.shape[0] == 1:
        return parts[0]
    out = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
    _sum_parts[(triton.cdiv(out.numel(), 256),)](parts, out, out.numel(), PARTS=parts.shape[0], BLOCK=256)
    return out


@triton.jit
def _sum_parts(parts_ptr, out_ptr, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Adds the partial sums in order, so that the result is the same every time. Unrolled, so that all loads are under way."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts_ptr + part * size + index, mask=index < size, other=0.0)
    tl.store(out_ptr + index, total.to(out_ptr.dtype.element_ty), mask=index < size)
