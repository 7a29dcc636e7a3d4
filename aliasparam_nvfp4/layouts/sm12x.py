"""Weights and scales as FlashInfer's W4A16 GEMM for compute capability 12.x wants them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aliasparam import Band, TensorSpec, Transform
from aliasparam._constants import kept
from aliasparam.errors import TransformError

from ..scales import need_block_scales


@dataclass(frozen=True)
class PackFragments(Transform):
    """Packed weights u8 ``[N, K/2]`` to u8 ``[K/16, 8N]``; the kernel reads them as int32 ``[K/16, 2N]``.

    Within a tile of 16 K by 64 N, int32 word p of 128 serves MMA lane ``(p//2) % 32``; its four bytes are the packed pairs
    ``k/2 = lane%4 + {0, 4, 0, 4}`` of rows ``8*(p//64) + lane//4 + 32*(p%2) + {0, 0, 16, 16}``
    (FlashInfer ``gemm_bf16_fp4_cute_dsl.py``, ``_cute_dsl_pack_fp4_weight``). A bijection of bytes. N % 64 == 0, K % 16 == 0.

    It has no bands: a tile's columns are a strided slice of every source row and one run of kernel bytes, so no piece of the one
    format covers the memory of a piece of the other. A region converts as a whole, with a copy of it as scratch.
    """

    core_dims: int = 2

    def output_spec(self, spec: TensorSpec) -> TensorSpec:
        n, half_k = spec.shape[-2:]
        if n % 64 or half_k % 8 or spec.dtype is not torch.uint8:
            raise TransformError(
                "no whole tiles of 16 K by 64 N", expected="uint8, N % 64 == 0, K % 16 == 0", found=f"{spec}, K={2 * half_k}"
            )
        return TensorSpec((*spec.shape[:-2], half_k // 8, 8 * n), spec.dtype)

    def forward(self, tensor: Tensor) -> Tensor:
        *lead, n, half_k = tensor.shape
        tiles = tensor.transpose(-1, -2).reshape(*lead, half_k // 8, 8, n // 64, 64).transpose(-3, -2).flatten(-2)
        return tiles[..., _gather(tensor.device)[0]].flatten(-2)

    def inverse(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
        *lead, n, half_k = spec.shape
        tiles = tensor.view(*tensor.shape[:-1], n // 64, 512)[..., _gather(tensor.device)[1]]
        columns: Tensor = tiles.reshape(*lead, half_k // 8, n // 64, 8, 64).transpose(-3, -2).reshape(*lead, half_k, n)
        return columns.transpose(-1, -2).contiguous()


@kept
def _gather(device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each of a tile's 512 bytes comes from in its (8, 64) source, and the way back."""
    word, byte = torch.meshgrid(torch.arange(128), torch.arange(4), indexing="ij")
    lane = (word // 2) % 32
    half_k = lane % 4 + 4 * (byte % 2)
    row = 8 * (word // 64) + lane // 4 + 32 * (word % 2) + 16 * (byte // 2)
    gather = (half_k * 64 + row).reshape(-1)
    return gather.to(device), gather.argsort().to(device)


@dataclass(frozen=True)
class ScalesToS0E5M3(Transform):
    """Block scales e4m3 ``[N, K/16]`` to u8 ``[K/16, N]``: the high bits of the float16 value without its sign.

    FlashInfer ``gemm_bf16_fp4_cute_dsl.py``, ``_e4m3_to_s0e5m3``. The sign is dropped, so this is no bijection of bytes:
    the source is kept and the kernel name has memory of its own. Negative scales are refused: it would make them positive.
    """

    lossless = False

    def output_spec(self, spec: TensorSpec) -> TensorSpec:
        return TensorSpec((*spec.shape[:-2], spec.shape[-1], spec.shape[-2]), torch.uint8)

    def band(self, spec: TensorSpec) -> Band | None:
        return None

    def forward(self, tensor: Tensor) -> Tensor:
        """Raises ScaleError for negative scales and for NaN."""
        need_block_scales(tensor, signed=False)
        bits = tensor.to(torch.float16).view(torch.int16).int()
        return ((bits >> 7) & 0xFF).to(torch.uint8).transpose(-1, -2).contiguous()

    def inverse(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
        raise TransformError("the sign is lost; the source is kept instead")
