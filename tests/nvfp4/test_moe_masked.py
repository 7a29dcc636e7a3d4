"""CuteDSL v1: the grouping, and the whole path with FlashInfer's three functions in torch, from their documented layouts."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from aliasparam_nvfp4.layouts import mma_view, swizzle
from aliasparam_nvfp4.linear.verify import signal_to_noise
from aliasparam_nvfp4.moe.runners import moe_runner
from aliasparam_nvfp4.moe.runners.flashinfer_cutedsl_masked import Groups
from aliasparam_nvfp4.quantize.codec import quantize_activation, scaled_codes

from .moe_layers import SHAPES, MoE, checkpoint, choices, dense, load

RUNNER = "flashinfer_cutedsl_masked"


@pytest.mark.parametrize("tokens, experts, k", [(1, 1, 1), (5, 3, 2), (9, 4, 4), (16, 8, 3)])
def test_groups_hold_each_experts_tokens_and_choices_find_their_rows(tokens: int, experts: int, k: int) -> None:
    ids = torch.randint(-1, experts + 1, (tokens, k), generator=torch.Generator().manual_seed(tokens), dtype=torch.int32)
    groups = Groups.of(ids, experts)
    assert groups.counts.dtype is torch.int32
    for expert in range(experts):
        own = [t for t in range(tokens) if expert in ids[t].tolist()]
        assert groups.tokens[expert, : int(groups.counts[expert])].tolist() == own
    flat = groups.tokens.flatten()
    for t in range(tokens):
        for j, expert in enumerate(ids[t].tolist()):
            assert bool(groups.own[t, j]) is (0 <= expert < experts)
            if groups.own[t, j]:
                assert int(flat[groups.row[t, j]]) == t and int(groups.row[t, j]) // tokens == expert


def test_masked_rows_never_reach_the_result() -> None:
    ids = torch.tensor([[0, 3], [0, -1]], dtype=torch.int32)  # expert 1 has no token: all its rows are masked
    groups = Groups.of(ids, 2)
    out = torch.full((2, 2, 4), float("nan"))
    out[0] = torch.tensor([[2.0], [3.0]])
    assert torch.equal(groups.combined(out, torch.tensor([[0.5, 1.0], [1.0, 1.0]])), torch.tensor([[1.0] * 4, [3.0] * 4]))


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """``scaled_fp4_grouped_quantize``, ``silu_and_mul_scaled_nvfp4_experts_quantize`` and ``grouped_gemm_nt_masked`` in torch."""
    fi, calls = pytest.importorskip("flashinfer"), []
    if not hasattr(fi.gemm, "grouped_gemm_nt_masked"):
        pytest.skip("flashinfer has no grouped_gemm_nt_masked without its compiler")
    names = ("scaled_fp4_grouped_quantize", "silu_and_mul_scaled_nvfp4_experts_quantize")
    first, second = (inspect.signature(getattr(fi, name)) for name in names)
    masked = inspect.signature(fi.gemm.grouped_gemm_nt_masked)

    def quantize(a: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        assert scale.shape == (a.shape[0],) and scale.dtype is torch.float32
        codes, blocks = quantize_activation(a, scale.view(-1, 1, 1))
        swizzled = swizzle().bind(blocks.shape, blocks.dtype).encode(blocks)
        return codes.permute(1, 2, 0), mma_view(swizzled, a.shape[1], blocks.shape[2], a.shape[0])

    def plain(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        call = first.bind(*args, **kwargs).arguments
        assert call["a"].dtype is torch.bfloat16 and call["a"].is_contiguous() and call["mask"].dtype is torch.int32
        return quantize(call["a"], call["a_global_sf"])

    def silu_and_mul(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        call = second.bind(*args, **kwargs).arguments
        assert call["a"].dtype is torch.bfloat16 and call["a"].is_contiguous() and call["mask"].dtype is torch.int32
        gate, up = call["a"].float().chunk(2, -1)
        return quantize(functional.silu(gate) * up, call["a_global_sf"])

    def values(operand: tuple[Tensor, Tensor], expert: int) -> Tensor:
        codes, blocks = operand[0][..., expert], operand[1][..., expert]
        rows, columns = codes.shape[0], codes.shape[1] // 8
        r, c = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        scales = blocks.view(torch.uint8)[r % 32, (r % 128) // 32, r // 128, c % 4, c // 4].view(torch.float8_e4m3fn)
        return scaled_codes(codes.contiguous(), scales)

    def gemm(*args: Any, **kwargs: Any) -> None:
        bound = masked.bind(*args, **kwargs)
        call, more = bound.arguments, bound.arguments["kwargs"]
        calls.append(bound.arguments)
        out, alpha = call["out"], more["alpha"]
        assert out.permute(2, 0, 1).is_contiguous() and out.dtype is torch.bfloat16, "or experts overwrite one another"
        assert alpha.shape == (1, 1, out.shape[2]) and alpha.dtype is torch.float32 and more["alpha_dtype"] == "float32"
        assert [call[n] for n in ("ab_dtype", "sf_dtype", "c_dtype", "sf_vec_size")] == [
            "float4_e2m1fn",
            "float8_e4m3fn",
            "bfloat16",
            16,
        ]
        out.fill_(float("nan"))
        for expert in range(out.shape[2]):
            own = int(call["masked_m"][expert])
            rows = values(call["lhs"], expert)[:own] @ values(call["rhs"], expert).T
            out[:own, :, expert] = (rows * alpha[0, 0, expert]).bfloat16()

    monkeypatch.setattr(fi, names[0], plain)
    monkeypatch.setattr(fi, names[1], silu_and_mul)
    monkeypatch.setattr(fi.gemm, "grouped_gemm_nt_masked", gemm)
    return calls


@pytest.mark.parametrize("dims", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [0, 1])
def test_the_masked_path_computes_the_layer(dims: tuple[int, int, int], rank: int, functions: list[Any]) -> None:
    e, h, i = dims
    tensors, layer = checkpoint(2 * e, h, i), MoE(RUNNER, e, h, i, ep_rank=rank, ep_size=2)
    load(layer, tensors)
    x, weights, ids = choices(6, 2 * e, h)
    out = moe_runner(RUNNER).apply(layer, x.bfloat16(), weights, ids, layer.nvfp4_moe_shape)  # type: ignore[arg-type]
    own = torch.where(ids // e == rank, weights, 0.0)
    assert signal_to_noise(out.double(), dense(tensors, x.bfloat16().float(), own, ids, inputs="each")) > 25
    for call, (weight, scales) in zip(
        functions,
        (("w13_weight_prepared", "w13_blockscale_swizzled"), ("w2_weight_prepared", "w2_blockscale_swizzled")),
        strict=True,
    ):
        assert [t.data_ptr() for t in call["rhs"]] == [layer.get_buffer(n).data_ptr() for n in (weight, scales)]
