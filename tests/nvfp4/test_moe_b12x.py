"""b12x: FlashInfer's own dispatch takes the call, and keeps no copy of weights that a reload would not reach."""

from __future__ import annotations

import inspect
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from aliasparam_nvfp4.linear.verify import signal_to_noise
from aliasparam_nvfp4.moe.activation import ExpertActivation
from aliasparam_nvfp4.moe.runners import MoEShape, moe_runner
from aliasparam_nvfp4.quantize.codec import quantize_activation, scaled_codes

from .moe_layers import SHAPES, MoE, checkpoint, choices, dense, load

fi = pytest.importorskip("flashinfer.fused_moe")
dispatch = pytest.importorskip("flashinfer.fused_moe.cute_dsl.blackwell_sm12x.moe_dispatch")
gemm = pytest.importorskip("flashinfer.gemm.gemm_bf16_fp4")
CACHES = ("_WEIGHT_CACHE", "_PADDED_WEIGHT_CACHE", "_W4A16_WEIGHT_CACHE")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The real ``b12x_fused_moe`` and ``launch_sm120_moe``; the kernel in torch, by ``quantize_block_fp4``'s formula."""
    seen: list[dict[str, Any]] = []

    def kernel(**call: Any) -> Tensor:
        weights = call["weights"]
        seen.append({**call, "weights": None, "addresses": [t.data_ptr() for t in storages(weights)]})
        a1, a2 = call["input_gs"], call["down_input_scale"]
        n, k, out = call["n"], call["k"], call["scatter_output"].zero_()
        for expert in range(call["num_experts"]):
            token, choice = (call["topk_ids"] == expert).nonzero(as_tuple=True)
            if not token.numel():
                continue
            w13 = values(weights.w1_storage, weights.w1_scale_storage, expert, 2 * n, k)
            w2 = values(weights.w2_storage, weights.w2_scale_storage, expert, k, n)
            up, gate = (scaled_codes(*quantize_activation(call["a"][token], 1 / a1)) @ w13.T * weights.w1_alpha[expert]).chunk(
                2, -1
            )
            hidden = scaled_codes(*quantize_activation(functional.silu(gate) * up, 1 / a2))
            rows = hidden @ w2.T * weights.w2_alpha[expert] * call["topk_weights"][token, choice].unsqueeze(-1)
            out.index_add_(0, token, rows.to(out.dtype))
        return out  # type: ignore[no-any-return]

    monkeypatch.setattr(fi, "b12x_fused_moe", inspect.unwrap(fi.b12x_fused_moe))
    monkeypatch.setattr("flashinfer.jit.cpp_ext.get_cuda_version", lambda: SimpleNamespace(major=13))
    monkeypatch.setattr(dispatch, "launch_sm120_static_moe", kernel)
    monkeypatch.setattr(dispatch, "launch_sm120_dynamic_moe", kernel)
    monkeypatch.setattr(dispatch, "_get_cached_workspace", lambda **_: None)
    monkeypatch.setattr(dispatch, "_validate_static_workspace_for_launch", lambda *args, **_: None)
    return seen


def storages(weights: Any) -> tuple[Tensor, ...]:
    return weights.w1_storage, weights.w1_scale_storage, weights.w2_storage, weights.w2_scale_storage


def values(weight: Tensor, scales: Tensor, expert: int, rows: int, columns: int) -> Tensor:
    swizzled = scales.reshape(weight.shape[0], -1)[expert].view(torch.uint8)
    return scaled_codes(weight[expert], gemm._unswizzle_sf_128x4(swizzled, rows, columns // 16).view(torch.float8_e4m3fn))


@pytest.mark.parametrize("tokens", [3, 700], ids=["static", "dynamic"])
@pytest.mark.parametrize("dims", SHAPES, ids=str)
def test_flashinfers_dispatch_computes_the_layer_and_keeps_nothing(
    dims: tuple[int, int, int], tokens: int, launches: Any
) -> None:
    layer, tensors = MoE("flashinfer_b12x", *dims), checkpoint(*dims)
    load(layer, tensors)
    x, weights, ids = choices(tokens, *dims[:2])
    watched: list[int] = []
    for seed in (0, 1):
        tensors = checkpoint(*dims, seed)
        load(layer, tensors)
        out = moe_runner("flashinfer_b12x").apply(layer, x.bfloat16(), weights, ids, layer.nvfp4_moe_shape)  # type: ignore[arg-type]
        few = slice(0, 3)
        expected = dense(tensors, x.bfloat16()[few].float(), weights[few], ids[few], inputs="all")
        assert signal_to_noise(out[few].double(), expected) > 30
        assert not any(getattr(dispatch, cache) for cache in CACHES)
        watched.append(len(weakref.finalize._registry))  # type: ignore[attr-defined]
    assert watched[0] == watched[1], "every call leaves something tied to the weights"
    names = ("w13_weight_prepared", "w13_blockscale_swizzled", "w2_weight_prepared", "w2_blockscale_swizzled")
    assert launches[-1]["addresses"] == [layer.get_buffer(name).data_ptr() for name in names], "weights were copied"


def test_a_clamped_activation_goes_by_its_numbers(launches: Any) -> None:
    dims = SHAPES[0]
    layer = MoE("flashinfer_b12x", *dims)
    load(layer, checkpoint(*dims))
    x, weights, ids = choices(3, *dims[:2])
    shape = MoEShape(*dims, all_experts=2, expert_activation=ExpertActivation(alpha=1.5, beta=0.5, limit=7.0))
    moe_runner("flashinfer_b12x").apply(layer, x.bfloat16(), weights, ids, shape)  # type: ignore[arg-type]
    call = launches[0]
    known = pytest.importorskip("flashinfer.fused_moe.cute_dsl.blackwell_sm12x.moe_activation").SUPPORTED_MOE_ACTIVATIONS
    assert call["activation"] in known
    assert (call["activation"], call["swiglu_alpha"], call["swiglu_beta"], call["swiglu_limit"]) == (
        "swigluoai_uninterleave",
        1.5,
        0.5,
        7.0,
    )


def test_processing_forgets_weights_kept_by_address(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = MoE("flashinfer_b12x", *SHAPES[0])
    load(layer, checkpoint(*SHAPES[0]))
    kept = {name: {"an address": 1} for name in CACHES}
    other = {"a compiled kernel": 1}
    for name, cache in kept.items():
        assert hasattr(dispatch, name), "the installed FlashInfer has these"
        monkeypatch.setattr(dispatch, name, cache)
    monkeypatch.setattr(dispatch, "_STATIC_KERNEL_CACHE", other)
    load(layer, {(0, "w1", "weight"): checkpoint(*SHAPES[0], seed=1)[0, "w1", "weight"]})
    assert not any(kept.values()) and other
    monkeypatch.delitem(sys.modules, "flashinfer.fused_moe.cute_dsl.blackwell_sm12x.moe_dispatch")
    moe_runner("flashinfer_b12x").weights_changed()
