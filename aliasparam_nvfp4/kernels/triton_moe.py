"""A mixture of experts with weights alone in NVFP4, from kernel-format bytes, in five launches.

plan (which slot goes to which expert), GEMM of w13, activation, GEMM of w2, weighted sum. Both GEMMs are the linear layer's
kernels with an expert for each tile. All sizes come from shapes, no value is looked at on the host, and every sum has one order:
the same input gives the same bytes, also under a captured CUDA graph. Scales of a whole expert meet float32 sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..moe.activation import ExpertActivation
from .gemm import most_decode_tokens, partial_sums
from .plan import plan
from .tiled import tile_sizes

#: Slots that are worked on at once, at most: bounds the float32 intermediates.
_SLOTS_AT_ONCE = 1 << 14
#: Columns of a program of the small kernels.
_BLOCK = 256


@dataclass(frozen=True)
class ExpertWeights:
    """Kernel-format tensors of one rank's experts.

    Attributes:
        w13: u8 ``[E, 2*I_pad, H_pad/2]``, rows ``[gate; up]``; without up rows where the activation is not gated.
        w13_scale: e4m3 ``[E, ...]``, 128x4-swizzled.
        w2: u8 ``[E, H_pad, I_pad/2]``.
        w2_scale: e4m3 ``[E, ...]``, 128x4-swizzled.
        gate: f32 ``[E]``, what gate sums are multiplied with.
        up: f32 ``[E]``, the same for up.
        down: f32 ``[E]``, the same for w2.
        first_expert: global number of the first of them.
        bias13: ``[E, 2I]``, gate above up, without a gate ``[E, I]``, added to true values; None where there are none.
        bias2: ``[E, H]``, likewise.
    """

    w13: Tensor
    w13_scale: Tensor
    w2: Tensor
    w2_scale: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    first_expert: int
    bias13: Tensor | None = None
    bias2: Tensor | None = None


def experts(
    x: Tensor, weights: ExpertWeights, topk_weights: Tensor, topk_ids: Tensor, *, intermediate: int, activation: ExpertActivation
) -> Tensor:
    """``[T, H] -> [T, H]`` in ``x.dtype``.

    Args:
        x: bf16 or fp16 ``[T, H]``, contiguous.
        weights: of this rank.
        topk_weights: ``[T, k]``.
        topk_ids: int32 ``[T, k]``, global numbers; those of other ranks give nothing.
        intermediate: I, unpadded.
        activation: what lies between the two GEMMs.
    """
    out = torch.empty_like(x)
    for rows in _pieces(x.shape[0], topk_ids.shape[1]):
        _some(x[rows], weights, topk_weights[rows].contiguous(), topk_ids[rows].contiguous(), intermediate, activation, out[rows])
    return out


def _pieces(tokens: int, k: int) -> Iterator[slice]:
    step = max(1, _SLOTS_AT_ONCE // k)
    for first in range(0, tokens, step):
        yield slice(first, first + step)


def _some(
    x: Tensor, w: ExpertWeights, topk_weights: Tensor, topk_ids: Tensor, i: int, activation: ExpertActivation, out: Tensor
) -> None:
    (tokens, h), k, e = x.shape, topk_ids.shape[1], w.w13.shape[0]
    slots = tokens * k
    planned = plan(topk_ids, experts=e, first_expert=w.first_expert, tile=_tile(tokens, slots, e, most_decode_tokens(x)))
    rows13 = w.w13.shape[1]
    sums13 = partial_sums(x, w.w13, w.w13_scale, n=rows13, planned=planned, slots=slots, share=k)
    hidden = torch.empty(slots, i, dtype=x.dtype, device=x.device)
    ids = topk_ids.reshape(-1)
    _activate[(slots, triton.cdiv(i, _BLOCK))](
        sums13,
        hidden,
        ids,
        w.gate,
        w.up,
        w.gate if w.bias13 is None else w.bias13,
        i,
        rows13 // 2,
        rows13,
        slots * rows13,
        w.first_expert,
        e,
        activation.alpha,
        activation.beta,
        float("inf") if activation.limit is None else activation.limit,
        PARTS=sums13.shape[0],
        GATED=activation.gated,
        BIAS=w.bias13 is not None,
        BLOCK=_BLOCK,
    )
    sums2 = partial_sums(hidden, w.w2, w.w2_scale, n=h, planned=planned, slots=slots)
    _combine[(tokens, triton.cdiv(h, _BLOCK))](
        sums2,
        out,
        ids,
        topk_weights.reshape(-1),
        w.down,
        w.down if w.bias2 is None else w.bias2,
        h,
        slots * h,
        w.first_expert,
        e,
        CHOICES=k,
        PARTS=sums2.shape[0],
        BIAS=w.bias2 is not None,
        BLOCK=_BLOCK,
    )


def _tile(tokens: int, slots: int, experts: int, most_decode: int) -> int:
    """Slots a tile: what an expert gets on average, up to what it can get at all."""
    average = -(-slots // experts)
    if min(tokens, average) <= most_decode:
        return 8 if tokens <= 8 or average <= 4 else 16
    return tile_sizes(min(tokens, 2 * average))["BLOCK_M"]


@triton.jit
def _activate(sums_ptr, out_ptr, ids_ptr, gate_ptr, up_ptr, bias_ptr, i_size, half, row_stride, part_stride, first_expert,
              experts, alpha, beta, limit, PARTS: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    """One slot's hidden row from its partial sums. Unrolled, so that all loads are under way at once."""
    slot = tl.program_id(0).to(tl.int64)
    expert = tl.load(ids_ptr + slot) - first_expert
    own = (expert >= 0) & (expert < experts)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < tl.where(own, i_size, 0)
    gate = tl.zeros((BLOCK,), dtype=tl.float32)
    up = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        at = sums_ptr + tl.cast(part_stride, tl.int64) * part + slot * row_stride + column
        gate += tl.load(at, mask=ok, other=0.0)
        if GATED:
            up += tl.load(at + half, mask=ok, other=0.0)
    expert = tl.where(own, expert, 0)
    gate *= tl.load(gate_ptr + expert)
    bias_row = bias_ptr + expert * (2 * i_size if GATED else i_size) + column
    if BIAS:
        gate += tl.load(bias_row, mask=ok, other=0.0).to(tl.float32)
    if GATED:
        up *= tl.load(up_ptr + expert)
        if BIAS:
            up += tl.load(bias_row + i_size, mask=ok, other=0.0).to(tl.float32)
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        result = gate / (1.0 + tl.exp(-alpha * gate)) * (up + beta)
    else:
        positive = tl.maximum(gate, 0.0)
        result = positive * positive
    tl.store(out_ptr + slot * i_size + column, result.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _combine(sums_ptr, out_ptr, ids_ptr, weights_ptr, down_ptr, bias_ptr, h_size, part_stride, first_expert, experts,
             CHOICES: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One token's row: its experts' partial sums, weighted, in the order of its choices. Unrolled as above."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in tl.static_range(CHOICES):
        slot = token * CHOICES + choice
        expert = tl.load(ids_ptr + slot) - first_expert
        own = (expert >= 0) & (expert < experts)
        row = tl.where(own, expert, 0)
        weight = tl.load(weights_ptr + slot).to(tl.float32)
        factor = tl.load(down_ptr + row) * weight
        value = tl.zeros((BLOCK,), dtype=tl.float32)
        for part in tl.static_range(PARTS):
            at = sums_ptr + tl.cast(part_stride, tl.int64) * part + slot * h_size + column
            value += tl.load(at, mask=column < tl.where(own, h_size, 0), other=0.0)
        value *= factor
        if BIAS:
            value += weight * tl.load(bias_ptr + row * h_size + column, mask=column < h_size, other=0.0).to(tl.float32)
        total += tl.where(own, value, 0.0)
    tl.store(out_ptr + token * h_size + column, total.to(out_ptr.dtype.element_ty), mask=column < h_size)
