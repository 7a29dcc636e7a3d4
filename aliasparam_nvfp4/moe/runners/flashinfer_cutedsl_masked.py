"""``flashinfer_cutedsl_masked``: CuteDSL v1, FlashInfer ``grouped_gemm_nt_masked`` twice, compute capability 10.x.

Each expert has its own input scales, and room for every token: ``[E, T, H]`` and ``[E, T, 2I]`` are allocated for a call, so
this is for decoding. The grouping has fixed shapes and asks nothing of the host, so a CUDA graph can hold it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...layouts import mma_view
from ...quantize.format import BLOCK_SIZE
from ..layouts import GATE_UP
from ..scales import InputScales
from ._base import MoENames, MoERunner, MoEShape, padded_input


class FlashInferCuteDslMasked(MoERunner):
    name = "flashinfer_cutedsl_masked"
    layout = GATE_UP
    input_scales = InputScales.EACH
    capabilities = frozenset({(10, 0), (10, 3), (10, 7)})
    packages = ("flashinfer", "cutlass", "triton")
    rank = 5
    call = "grouped_gemm_nt_masked"

    def apply(self, layer: MoENames, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shape: MoEShape) -> Tensor:
        from flashinfer import scaled_fp4_grouped_quantize, silu_and_mul_scaled_nvfp4_experts_quantize

        self.check_activation(shape.expert_activation)
        hidden, intermediate = shape.padded(self.layout)
        groups = Groups.of(topk_ids - shape.first_expert, shape.experts)
        rows = padded_input(x, shape, self.layout).to(torch.bfloat16)[groups.tokens]
        rows = scaled_fp4_grouped_quantize(rows, groups.counts, layer.w13_input_scale_quant)
        w13 = _operand(layer.w13_weight_prepared, layer.w13_blockscale_swizzled, 2 * intermediate, hidden)
        gate_up = _gemm(rows, w13, groups.counts, layer.g1_alphas)
        rows = silu_and_mul_scaled_nvfp4_experts_quantize(gate_up, groups.counts, layer.w2_input_scale_quant)
        w2 = _operand(layer.w2_weight_prepared, layer.w2_blockscale_swizzled, hidden, intermediate)
        out = _gemm(rows, w2, groups.counts, layer.g2_alphas)
        return groups.combined(out, topk_weights)[:, : shape.hidden].to(x.dtype)


@dataclass(frozen=True)
class Groups:
    """Tokens grouped by expert.

    Attributes:
        tokens: int64 ``[E, T]``, the tokens of each expert in order, then 0 where its rows are masked.
        counts: int32 ``[E]``, how many of them are its own.
        row: int64 ``[T, k]``, where a choice's row is among ``[E * T]``.
        own: bool ``[T, k]``, whether the choice is of one of these experts.
    """

    tokens: Tensor
    counts: Tensor
    row: Tensor
    own: Tensor

    @staticmethod
    def of(ids: Tensor, experts: int) -> Groups:
        """From numbers ``[T, k]`` within this rank; those outside 0 to E-1 are of no expert here."""
        tokens, device = ids.shape[0], ids.device
        own = (ids >= 0) & (ids < experts)
        within = torch.where(own, ids, experts).long()
        chosen = torch.zeros(tokens, experts + 1, dtype=torch.bool, device=device).scatter_(1, within, True)[:, :experts]
        place = chosen.long().cumsum(0) - 1
        column = torch.where(chosen, place, tokens).T  # the last column takes what is of no expert, and goes
        number = torch.arange(tokens, device=device).expand(experts, tokens)
        grouped = torch.zeros(experts, tokens + 1, dtype=torch.long, device=device).scatter_(1, column, number)[:, :tokens]
        within = within.clamp(max=experts - 1)
        row = within * tokens + place.gather(1, within).clamp(min=0)
        return Groups(grouped, chosen.sum(0, dtype=torch.int32), row, own)

    def combined(self, out: Tensor, weights: Tensor) -> Tensor:
        """``[E, T, H]`` to f32 ``[T, H]``: each token's rows, weighted and summed. Masked rows may hold anything."""
        rows = out.flatten(0, 1)[self.row].float()
        return (torch.where(self.own.unsqueeze(-1), rows, 0.0) * weights.float().unsqueeze(-1)).sum(1)


def _operand(weight: Tensor, scales: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """(``[N, K/2, E]``, scales as the MMA indexes them), both views."""
    return weight.permute(1, 2, 0), mma_view(scales, rows, columns // BLOCK_SIZE, weight.shape[0])


def _gemm(rows: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor], counts: Tensor, alpha: Tensor) -> Tensor:
    """bf16 ``[E, T, N]``, each expert's sum times its alpha."""
    from flashinfer.gemm import grouped_gemm_nt_masked

    tokens, (n, _, experts) = rows[0].shape[0], weight[0].shape
    out = torch.empty(experts, tokens, n, dtype=torch.bfloat16, device=counts.device)
    grouped_gemm_nt_masked(
        rows,
        weight,
        out.permute(1, 2, 0),
        counts,
        ab_dtype="float4_e2m1fn",
        sf_dtype="float8_e4m3fn",
        c_dtype="bfloat16",
        sf_vec_size=BLOCK_SIZE,
        alpha=alpha.view(1, 1, experts),
        alpha_dtype="float32",
    )
    return out


RUNNER = FlashInferCuteDslMasked()
