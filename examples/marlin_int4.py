"""INT4 weights of AWQ and GPTQ checkpoints in Marlin's tiles, in place: every step moves nibbles, none is lost.

Formats: Marlin tile and fragment order as in vLLM ``quantization/utils/marlin_utils_test.py`` (``get_weight_perm``,
``marlin_permute_weights``), scales ``marlin_permute_scales``, zeros ``awq_to_marlin_zero_points``. AWQ packs 8 columns in the
order 0 2 4 6 1 3 5 7, GPTQ packs 8 rows in order. Without act-order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aliasparam import Alias, AliasRegistry, Band, TensorSpec, Transform, declare
from aliasparam.errors import TransformError

_AWQ = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])


def unpack(words: Tensor, along: int = -1) -> Tensor:
    """int32 words to nibbles u8, eight for each word along dim ``along``."""
    nibbles = (words.unsqueeze(-1) >> torch.arange(0, 32, 4, device=words.device)) & 15
    return (nibbles.transpose(-1, -2).flatten(-3, -2) if along == -2 else nibbles.flatten(-2)).to(torch.uint8)


def pack(nibbles: Tensor, along: int = -1) -> Tensor:
    """The inverse of :func:`unpack`."""
    groups = nibbles.unflatten(along, (-1, 8)).movedim(along, -1).long()
    return (groups << torch.arange(0, 32, 4, device=nibbles.device)).sum(-1).to(torch.int32)  # wraps: the top bit is the sign


def regroup(values: Tensor, order: Tensor) -> Tensor:
    """Every ``len(order)`` columns in another order."""
    return values.unflatten(-1, (-1, len(order)))[..., order.to(values.device)].flatten(-2)


#: Where each nibble of four 16x16 blocks is read from: per lane and block, the eight entries of its MMA fragment.
_LANE, _BLOCK, _HALF, _ENTRY = torch.meshgrid(*map(torch.arange, (32, 4, 2, 4)), indexing="ij")
_ROW = 2 * (_LANE % 4) + torch.tensor([0, 1, 8, 9])[_ENTRY]
_FRAGMENTS = regroup((16 * _ROW + _LANE // 4 + 8 * _HALF + 256 * _BLOCK).reshape(-1), _AWQ)
#: Scales within 64 columns; packed zero points are in AWQ's order before and after.
_SCALES = torch.arange(64).view(8, 8).t().reshape(-1)
_ZEROS = regroup(regroup(regroup(torch.arange(64), _AWQ.argsort()), _SCALES), _AWQ)


@dataclass(frozen=True)
class ToMarlin(Transform):
    """int32 ``[K, N/8]`` (AWQ) or ``[K/8, N]`` (GPTQ) to int32 ``[K/16, 2N]``. K % 16 == 0, N % 64 == 0."""

    awq: bool = True

    def band(self, spec: TensorSpec) -> Band | None:
        return Band(-2, 16 if self.awq else 2)

    def output_spec(self, spec: TensorSpec) -> TensorSpec:
        k, n = (spec.shape[-2], spec.shape[-1] * 8) if self.awq else (spec.shape[-2] * 8, spec.shape[-1])
        if k % 16 or n % 64 or spec.dtype is not torch.int32:
            raise TransformError("no Marlin tiles", expected="int32, K % 16 == 0, N % 64 == 0", found=f"{spec}, K={k}, N={n}")
        return TensorSpec((*spec.shape[:-2], k // 16, 2 * n), torch.int32)

    def forward(self, tensor: Tensor) -> Tensor:
        values = regroup(unpack(tensor), _AWQ.argsort()) if self.awq else unpack(tensor, -2)
        return pack(regroup(values.unflatten(-2, (-1, 16)).unflatten(-1, (-1, 16)).transpose(-3, -2).flatten(-3), _FRAGMENTS))

    def inverse(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
        blocks = regroup(unpack(tensor), _FRAGMENTS.argsort()).unflatten(-1, (-1, 16, 16))
        values = blocks.transpose(-3, -2).flatten(-2).flatten(-3, -2)
        return pack(regroup(values, _AWQ)) if self.awq else pack(values, -2)


@dataclass(frozen=True)
class PermuteColumns(Transform):
    """Group scales ``[K/G, N]``, or packed AWQ zero points ``[K/G, N/8]``, in Marlin's order within 64 columns."""

    packed: bool = False

    def output_spec(self, spec: TensorSpec) -> TensorSpec:
        return spec

    def forward(self, tensor: Tensor) -> Tensor:
        return pack(regroup(unpack(tensor), _ZEROS)) if self.packed else regroup(tensor, _SCALES)

    def inverse(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
        return pack(regroup(unpack(tensor), _ZEROS.argsort())) if self.packed else regroup(tensor, _SCALES.argsort())


def declare_int4(layer: nn.Module, *, awq: bool) -> AliasRegistry:
    """``qweight``, ``scales`` and, for AWQ, ``qzeros`` as the checkpoint stores them, to Marlin's format in the same memory."""
    zeros = [Alias("qzeros", "qzeros_marlin", PermuteColumns(packed=True))] if awq else []
    weight, scales = Alias("qweight", "qweight_marlin", ToMarlin(awq)), Alias("scales", "scales_marlin", PermuteColumns())
    return declare(layer, weight, scales, *zeros, loaded=False)


def make_layer(k: int = 64, n: int = 128, group: int = 32, *, awq: bool = True) -> nn.Module:
    layer = nn.Module()
    layer.qweight = nn.Parameter(torch.empty((k, n // 8) if awq else (k // 8, n), dtype=torch.int32), requires_grad=False)
    layer.scales = nn.Parameter(torch.empty(k // group, n, dtype=torch.float16), requires_grad=False)
    if awq:
        layer.qzeros = nn.Parameter(torch.empty(k // group, n // 8, dtype=torch.int32), requires_grad=False)
    declare_int4(layer, awq=awq)
    return layer
