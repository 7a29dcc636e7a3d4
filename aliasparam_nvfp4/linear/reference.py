"""The NVFP4 GEMM in plain torch, from the bytes of the CUTLASS kernel format."""

from __future__ import annotations

from torch import Tensor

from ..layouts.mma_view import unswizzled
from ..quantize.codec import quantize_activation, scaled_codes
from ..quantize.format import BLOCK_SIZE


def linear_from_kernel_format(
    x: Tensor,
    weight_prepared: Tensor,
    weight_scale_interleaved: Tensor,
    alpha: Tensor,
    input_scale_inv: Tensor,
    *,
    n: int,
    k: int,
) -> Tensor:
    """``x [..., k] -> [..., n]`` in ``x.dtype``: activations quantized, float32 sums, then ``alpha``.

    Args:
        x: activations, bf16, fp16 or f32.
        weight_prepared: u8 ``[>= n, >= k/2]`` packed codes, zero-padded.
        weight_scale_interleaved: e4m3 block scales, 128x4 swizzled, ``[ceil(n/128)*128, ceil(k/64)*4]``.
        alpha: f32 ``[1]``, ``input_scale * weight_scale_2``, or one for each row of ``x``.
        input_scale_inv: f32 ``[1]``, ``1 / input_scale``, or one for each row of ``x``.
        n: logical output features.
        k: logical input features.
    """
    codes, scale = quantize_activation(x, input_scale_inv)
    weight = kernel_weight(weight_prepared, weight_scale_interleaved, n=n, k=k)
    return ((scaled_codes(codes, scale) @ weight.T) * alpha).to(x.dtype)


def kernel_weight(weight_prepared: Tensor, weight_scale_interleaved: Tensor, *, n: int, k: int) -> Tensor:
    """f32 ``[n, k]`` of ``code * block scale`` from kernel-format bytes, without the global scale."""
    scale = unswizzled(weight_scale_interleaved, n, k // BLOCK_SIZE)
    return scaled_codes(weight_prepared[:n, : k // 2], scale)
