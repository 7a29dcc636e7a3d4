"""Codes, block scales and values of NVFP4, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ShapeError
from .constants import cached_constant
from .format import BLOCK_SIZE, E2M1_MAX, E2M1_VALUES, E4M3_MAX, E4M3_TINY


def unpack_codes(packed: Tensor) -> Tensor:
    """u8 ``[..., K/2]`` to codes 0..15, u8 ``[..., K]``."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def pack_codes(codes: Tensor) -> Tensor:
    """Codes 0..15, u8 ``[..., K]`` with K even, to u8 ``[..., K/2]``."""
    if codes.shape[-1] % 2:
        raise ShapeError("two codes share a byte", expected="an even last dim", found=list(codes.shape))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def round_to_codes(values: Tensor) -> Tensor:
    """Nearest e2m1 code of each value, u8; ties go to the even code, magnitudes above 6 saturate, -0 and small negatives
    keep their sign (code 8)."""
    magnitude = values.abs()
    bounds = _bounds(values.dtype, values.device)
    index = torch.searchsorted(bounds, magnitude.contiguous(), right=False)
    # searchsorted leaves a tie below its bound; the even neighbour of bounds 1, 3 and 5 is the upper one.
    ties = (magnitude == bounds[1]) | (magnitude == bounds[3]) | (magnitude == bounds[5])
    return (index + ties + 8 * torch.signbit(values)).to(torch.uint8)


@cached_constant
def _bounds(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Midpoints between neighbouring magnitudes."""
    return torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=device, dtype=dtype)


def scaled_codes(packed: Tensor, block_scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``code * block scale`` without the global scale, ``[..., K]``; exact in bfloat16 and float32.

    A code has 2 significant bits and an e4m3 scale 4, so the product has at most 6 (bfloat16 holds 8).

    Args:
        packed: u8 ``[..., K/2]``.
        block_scale: e4m3 ``[..., K/16]``, row-major.
        dtype: float32 or bfloat16.
    """
    table = _pairs(dtype, packed.device)
    pairs = torch.index_select(table, 0, packed.reshape(-1).int())
    blocks = pairs.view(dtype).view(*block_scale.shape, BLOCK_SIZE)
    blocks.mul_(block_scale.to(dtype).unsqueeze(-1))
    return blocks.flatten(-2)


@cached_constant
def _pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """For each byte its two values, as one integer of twice the width: one gather instead of two."""
    values = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)])
    byte = torch.arange(256)
    wide = {torch.float32: torch.int64, torch.bfloat16: torch.int32}[dtype]
    return torch.stack([values[byte & 15], values[byte >> 4]], dim=1).to(dtype).view(wide).reshape(-1).to(device)


def dequantize(packed: Tensor, block_scale: Tensor, global_scale: Tensor) -> Tensor:
    """Values f32 ``[..., K]`` as ModelOpt computes them: ``code * (float(block scale) * global scale)``.

    Args:
        packed: u8 ``[..., K/2]``.
        block_scale: e4m3 ``[..., K/16]``, row-major.
        global_scale: f32 scalar, the multiplier (ModelOpt's ``weight_scale_2``).
    """
    values = scaled_codes(packed, torch.ones_like(block_scale))
    scale = (block_scale.float() * global_scale).unsqueeze(-1)
    return (values.view(*block_scale.shape, BLOCK_SIZE) * scale).flatten(-2)


def quantize(weight: Tensor, global_scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(packed u8, block scale e4m3, global scale f32) of a weight ``[..., K]``, K a multiple of 16.

    The order of operations is ModelOpt's (``NVFP4QTensor.quantize``), so the bytes are its bytes: block scale
    ``amax / (6 * global)``, at least 2^-9, 1.0 for a block of zeros; code of ``value / (scale * global)``. A quotient of -0.0
    has code 0, as in ModelOpt, which takes the sign from ``value < 0``; a negative one that rounds to zero has code 8.
    """
    if weight.shape[-1] % BLOCK_SIZE:
        raise ShapeError("NVFP4 needs whole blocks", expected=f"K a multiple of {BLOCK_SIZE}", found=list(weight.shape))
    blocks = weight.reshape(*weight.shape[:-1], weight.shape[-1] // BLOCK_SIZE, BLOCK_SIZE).float()
    if global_scale is None:
        global_scale = weight.abs().amax().float() / (E2M1_MAX * E4M3_MAX)
    amax = blocks.abs().amax(-1)
    scale = amax / (E2M1_MAX * global_scale)
    scale = torch.where(scale == 0, 1.0, scale).clamp(min=E4M3_TINY, max=E4M3_MAX).to(torch.float8_e4m3fn)
    codes = round_to_codes(blocks / (scale.float() * global_scale).unsqueeze(-1) + 0.0)  # -0.0 + 0.0 is 0.0
    return pack_codes(codes.flatten(-2)), scale, global_scale


def quantize_activation(x: Tensor, input_scale_inv: Tensor) -> tuple[Tensor, Tensor]:
    """(packed u8 ``[..., K/2]``, block scale e4m3 ``[..., K/16]`` row-major) of activations ``[..., K]``.

    FlashInfer's convention (``fp4_quantize``; ``quantization_utils.cuh``, ``cvt_warp_fp16_to_fp4``): block scale
    ``e4m3(input_scale_inv * amax / 6)``, code of ``x * (input_scale_inv / scale)``; a block whose scale rounds to zero
    has zero codes. The kernel uses approximate reciprocals, so single codes may differ by one there.
    """
    if x.shape[-1] % BLOCK_SIZE:
        raise ShapeError("NVFP4 needs whole blocks", expected=f"K a multiple of {BLOCK_SIZE}", found=list(x.shape))
    blocks = x.float().reshape(*x.shape[:-1], x.shape[-1] // BLOCK_SIZE, BLOCK_SIZE)
    scale = (input_scale_inv * (blocks.abs().amax(-1) / E2M1_MAX)).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    factor = torch.where(scale.float() == 0, 0.0, input_scale_inv / scale.float())
    codes = round_to_codes(blocks * factor.unsqueeze(-1))
    return pack_codes(codes.flatten(-2)), scale
