"""Proof (c) of MoE runners whose kernel takes a whole layer: the call binds to the installed signature, with what it checks."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from aliasparam_nvfp4.errors import BackendError, ShapeError
from aliasparam_nvfp4.moe.activation import RELU2, ExpertActivation
from aliasparam_nvfp4.moe.routing import Routing
from aliasparam_nvfp4.moe.runners import MoEShape, moe_runner, moe_runners
from aliasparam_nvfp4.moe.runners._trtllm import pack_choices
from aliasparam_nvfp4.moe.runners.flashinfer_trtllm import method_number

from .moe_layers import SHAPES, MoE, checkpoint, choices, load

every_shape = pytest.mark.parametrize("dims", SHAPES, ids=str)
TRTLLM = ["flashinfer_trtllm", "flashinfer_trtllm_routed"]


def loaded(runner: str, dims: tuple[int, int, int]) -> Any:
    layer = MoE(runner, *dims)
    load(layer, checkpoint(*dims))
    return layer


def padded(layer: Any) -> tuple[int, int]:
    return layer.nvfp4_moe_shape.padded(layer.method.backend.layout)  # type: ignore[no-any-return]


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> Any:
    """FlashInfer's entry points bind their arguments; they and its quantizer answer zeros of the right shapes."""
    fi = pytest.importorskip("flashinfer")
    quantizer, calls = inspect.signature(fi.fp4_quantize), []

    def quantize(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        given = quantizer.bind(*args, **kwargs).arguments
        tokens, hidden = given["input"].shape
        assert given["is_sf_swizzled_layout"] is False and given["global_scale"].shape == (1,)
        return torch.zeros(tokens, hidden // 2, dtype=torch.uint8), torch.zeros(tokens, hidden // 16, dtype=torch.uint8)

    def watch(name: str) -> None:
        if not hasattr(fi.fused_moe, name):
            pytest.skip(f"flashinfer has no {name} without its compiler")
        signature = inspect.signature(getattr(fi.fused_moe, name))

        def kernel(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs)
            calls.append((name, call.arguments))
            first = call.arguments.get("hidden_states", call.arguments.get("x", call.arguments.get("input")))
            assert first is not None
            out = torch.zeros(first.shape[0], first.shape[1] * (2 if first.dtype is torch.uint8 else 1), dtype=torch.bfloat16)
            return out if name == "cute_dsl_fused_moe" else [out]

        monkeypatch.setattr(fi.fused_moe, name, kernel)

    monkeypatch.setattr(fi, "fp4_quantize", quantize)
    for name in ("trtllm_fp4_block_scale_moe", "trtllm_fp4_block_scale_routed_moe", "cutlass_fused_moe", "cute_dsl_fused_moe"):
        watch(name)
    return calls


def check(found: Any, expected: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    for name, (shape, dtype) in expected.items():
        assert (tuple(found[name].shape), found[name].dtype) == (shape, dtype), name


def trtllm_arguments(e: int, h: int, i: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    u8, e4m3, f32 = torch.uint8, torch.float8_e4m3fn, torch.float32
    return {
        "hidden_states": ((3, h // 2), u8),
        "hidden_states_scale": ((3, h // 16), e4m3),
        "gemm1_weights": ((e, 2 * i, h // 2), u8),
        "gemm1_weights_scale": ((e, 2 * i, h // 16), e4m3),
        "gemm2_weights": ((e, h, i // 2), u8),
        "gemm2_weights_scale": ((e, h, i // 16), e4m3),
        **{f"output{name}_scalar": ((e,), f32) for name in ("1_scale", "1_scale_gate", "2_scale")},
    }


@pytest.mark.parametrize("runner", TRTLLM)
@every_shape
def test_trtllm_takes_a_choice_packed(runner: str, dims: tuple[int, int, int], bound: Any) -> None:
    layer = loaded(runner, dims)
    x, weights, ids = choices(3, *dims[:2])
    out = moe_runner(runner).apply(layer, x.bfloat16(), weights, ids, layer.nvfp4_moe_shape)
    assert out.shape == (3, dims[1]) and out.dtype is torch.bfloat16
    ((name, call),) = bound
    assert name == "trtllm_fp4_block_scale_routed_moe"
    check(call, {"topk_ids": ((3, 2), torch.int32), **trtllm_arguments(dims[0], *padded(layer))})
    assert call["hidden_states_scale_layout"].name == "layout_linear"


BIAS = torch.linspace(-1, 1, 8)
METHODS = [
    (Routing("softmax_topk", 2), "Default"),
    (Routing("softmax_topk_renormalized", 2), "Renormalize"),
    (Routing("sigmoid_topk", 1), "Llama4"),
    (Routing("sigmoid_topk", 2), "TopKSigmoid"),
    (Routing("sigmoid_bias_grouped", 2, bias=BIAS), "DeepSeekV3"),
    (Routing("sigmoid_bias_grouped", 2, bias=BIAS, groups=4, top_groups=2, scaling=2.5), "DeepSeekV3"),
]


@pytest.mark.parametrize("routing, method", METHODS, ids=lambda value: value if isinstance(value, str) else "")
def test_trtllm_routes_inside_the_kernel(routing: Routing, method: str, bound: Any) -> None:
    dims = (8, 128, 128)
    layer, logits = loaded("flashinfer_trtllm", dims), torch.randn(3, 8).half()
    out = moe_runner("flashinfer_trtllm").apply_logits(layer, torch.randn(3, 128), logits, routing, layer.nvfp4_moe_shape)
    assert out.shape == (3, 128) and out.dtype is torch.float32
    ((name, call),) = bound
    assert name == "trtllm_fp4_block_scale_moe"
    check(call, {"routing_logits": ((3, 8), torch.float32), **trtllm_arguments(*dims)})
    enum = pytest.importorskip("flashinfer.tllm_enums").RoutingMethodType
    assert call["routing_method_type"] == enum[method].value == method_number(routing) and call["top_k"] == routing.top_k
    grouped = (routing.groups, routing.top_groups, routing.scaling) if routing.bias is not None else (None, None, None)
    assert (call["n_group"], call["topk_group"], call["routed_scaling_factor"]) == grouped
    assert call["routing_bias"] is routing.bias


def test_a_routing_the_kernel_lacks_is_refused_or_done_before_it(bound: Any) -> None:
    layer = loaded("flashinfer_trtllm", (8, 128, 128))
    runner, x, logits = moe_runner("flashinfer_trtllm"), torch.randn(3, 128), torch.randn(3, 8)
    with pytest.raises(BackendError, match=r"(?s)flashinfer_trtllm.*renormalize"):
        plain = Routing("sigmoid_bias_grouped", 2, bias=BIAS, renormalize=False)
        runner.apply_logits(layer, x, logits, plain, layer.nvfp4_moe_shape)
    runner.apply_logits(layer, x, logits, Routing("sigmoid_topk", 1, on_input=True), layer.nvfp4_moe_shape)
    ((name, call),) = bound
    assert name == "trtllm_fp4_block_scale_routed_moe"
    assert torch.equal((call["topk_ids"] & 0xFFFF).to(torch.uint16).view(torch.bfloat16), torch.ones(3, 1, dtype=torch.bfloat16))


@every_shape
def test_cutlass_takes_int64_weights_and_int32_scales(dims: tuple[int, int, int], bound: Any) -> None:
    layer = loaded("flashinfer_cutlass", dims)
    x, weights, ids = choices(3, *dims[:2])
    out = moe_runner("flashinfer_cutlass").apply(layer, x.bfloat16(), weights, ids, layer.nvfp4_moe_shape)
    assert out.shape == (3, dims[1])
    ((_, call),) = bound
    e, (h, i) = dims[0], padded(layer)
    expected = {
        "token_selected_experts": ((3, 2), torch.int32),
        "fc1_expert_weights": ((e, 2 * i, h // 16), torch.int64),
        "fc2_expert_weights": ((e, h, i // 16), torch.int64),
    }
    check(call, expected)
    _, sf13, alphas, _, sf2, _ = call["quant_scales"]
    assert (sf13.dtype, tuple(sf13.shape)) == (torch.int32, (e, 2 * i, h // 64))
    assert (sf2.dtype, tuple(sf2.shape)) == (torch.int32, (e, -(-h // 128) * 128, i // 64))
    assert alphas.dtype is torch.float32


@every_shape
def test_cutedsl_takes_scales_as_the_mma_indexes_them(dims: tuple[int, int, int], bound: Any) -> None:
    layer = loaded("flashinfer_cutedsl", dims)
    x, weights, ids = choices(3, *dims[:2])
    out = moe_runner("flashinfer_cutedsl").apply(layer, x.bfloat16(), weights, ids, layer.nvfp4_moe_shape)
    assert out.shape == (3, dims[1])
    ((_, call),) = bound
    e, (h, i) = dims[0], padded(layer)
    expected = {
        "x_sf": ((3, h // 16), torch.float8_e4m3fn),
        "w1_weight": ((e, 2 * i, h // 2), torch.uint8),
        "w1_weight_sf": ((32, 4, 2 * i // 128, 4, h // 64, e), torch.float8_e4m3fn),
        "fc2_input_scale": ((1,), torch.float32),
    }
    check(call, expected)


def test_packed_choices_are_expert_and_bfloat16_bits() -> None:
    ids, weights = torch.tensor([[0, 5], [383, 1]], dtype=torch.int32), torch.tensor([[0.25, 1.0], [-0.5, 3e-5]])
    packed = pack_choices(ids, weights)
    assert packed.dtype is torch.int32 and torch.equal(packed >> 16, ids)
    assert torch.equal((packed & 0xFFFF).to(torch.uint16).view(torch.bfloat16), weights.bfloat16())


@pytest.mark.parametrize("runner", ["flashinfer_cutedsl_masked"])
def test_an_activation_the_kernel_lacks_is_refused_by_name(runner: str) -> None:
    layer = loaded(runner, SHAPES[0])
    x, weights, ids = choices(3, *SHAPES[0][:2])
    for activation in (RELU2, ExpertActivation(limit=7.0)):
        shape = MoEShape(*SHAPES[0], all_experts=2, expert_activation=activation)
        with pytest.raises(BackendError, match=rf"(?s){runner}.*swiglu"):
            moe_runner(runner).apply(layer, x, weights, ids, shape)


@pytest.mark.parametrize("runner", [name for name in sorted(moe_runners()) if name.startswith("flashinfer")])
def test_without_its_gpu_a_runner_refuses_logits_too(runner: str) -> None:
    layer = loaded(runner, SHAPES[0])
    with pytest.raises(BackendError, match="compute capability"):
        layer.method.apply_logits(layer, torch.randn(3, 128).bfloat16(), torch.randn(3, 2), Routing("softmax_topk", 1))


def test_logits_give_what_the_choice_gives() -> None:
    layer, x, logits = loaded("reference", SHAPES[0]), torch.randn(2, 3, 128), torch.randn(6, 2)
    routing = Routing("softmax_topk_renormalized", 2)
    assert torch.equal(layer.method.apply_logits(layer, x, logits, routing), layer(x, *routing.choose(logits)))
    first = Routing("sigmoid_topk", 1, on_input=True)
    weights, ids = first.choose(logits)
    scaled = (x.view(6, 128) * weights).view_as(x)
    assert torch.equal(layer.method.apply_logits(layer, x, logits, first), layer(scaled, torch.ones_like(weights), ids))
    assert layer.method.apply_logits(layer, x[:0], logits[:0], routing).shape == (0, 3, 128)
    for bad in (logits[:5], torch.randn(6, 3)):
        with pytest.raises(ShapeError):
            layer.method.apply_logits(layer, x, bad, routing)
