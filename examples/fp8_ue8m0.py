"""Block-scaled FP8 for DeepGEMM on Blackwell: scales as UE8M0 bytes, four to an int32, MN-major, rows aligned to 16 bytes.

Layout: DeepGEMM ``get_mn_major_tma_aligned_packed_ue8m0_tensor``; int32 word (k/4, mn) holds the exponents of four blocks
along K. Kept here as bytes ``[ceil(K/4), align(MN, 4), 4]``; ``kernel_view`` is what the GEMM gets.

Two checkpoints: UE8M0 bytes (MXFP8) share their memory with the kernel; f32 block scales (DeepSeek) are broadcast to rows and
lose all but their exponent, which is no order of their bytes: they are re-encoded, and kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aliasparam import Alias, AliasRegistry, Layout, Reencoding, TensorSpec, declare
from aliasparam.errors import LayoutError

from .lines import PACKED_UE8M0


@dataclass(frozen=True)
class PackBlockScales:
    """f32 powers of two, one per 128x128 block, to packed exponents of ``rows`` rows."""

    rows: int

    def output(self, spec: TensorSpec) -> TensorSpec:
        return TensorSpec(PACKED_UE8M0.kernel_shape((*spec.shape[:-2], self.rows, spec.shape[-1])), torch.uint8)

    def __call__(self, scales: Tensor) -> Tensor:
        bits = scales.view(torch.int32)
        if bool(((bits & 0x807FFFFF) != 0).any()):
            raise LayoutError("a block scale is no power of two", remedy="Re-quantize the weight to UE8M0 scales at export.")
        block = torch.arange(self.rows, device=scales.device) // 128
        by_rows = (bits >> 23).to(torch.uint8).index_select(-2, block)
        return PACKED_UE8M0.bind(by_rows.shape, torch.uint8).encode(by_rows)


def kernel_view(packed: Tensor, rows: int) -> Tensor:
    """int32 ``[rows, ceil(K/4)]`` with strides ``(1, aligned rows)`` over the packed bytes."""
    return packed.view(torch.int32).squeeze(-1).mT[..., :rows, :]


def declare_fp8(layer: nn.Module) -> AliasRegistry:
    """``weight`` e4m3 ``[N, K]`` and ``weight_scale_inv``: u8 ``[N, K/32]``, or f32 ``[ceil(N/128), ceil(K/128)]``."""
    pack: Layout | Reencoding = PACKED_UE8M0
    if layer.weight_scale_inv.dtype is torch.float32:
        by_blocks = PackBlockScales(layer.weight.shape[0])
        pack = Reencoding(by_blocks, by_blocks.output)
    return declare(layer, Alias("weight", "weight_prepared"), Alias("weight_scale_inv", "scale_packed", pack), loaded=False)


def make_layer(n: int = 200, k: int = 256, *, scale_bytes: bool = True) -> nn.Module:
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.empty(n, k, dtype=torch.float8_e4m3fn), requires_grad=False)
    scale = torch.empty(n, k // 32, dtype=torch.uint8) if scale_bytes else torch.empty(-(-n // 128), -(-k // 128))
    layer.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
    declare_fp8(layer)
    return layer
