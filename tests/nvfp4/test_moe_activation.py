"""Experts without a gate, and SwiGLU with alpha, beta and limit, on every runner that has them."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from aliasparam_nvfp4 import NvFp4MoEMethod
from aliasparam_nvfp4.errors import BackendError
from aliasparam_nvfp4.linear.verify import signal_to_noise
from aliasparam_nvfp4.moe.activation import RELU2, ExpertActivation
from aliasparam_nvfp4.moe.emulate import layer_output
from aliasparam_nvfp4.moe.emulate import weights as emulated
from aliasparam_nvfp4.moe.runners import moe_runner
from aliasparam_nvfp4.moe.runners._base import MoERunner
from aliasparam_nvfp4.moe.scales import InputScales
from aliasparam_nvfp4.quantize.codec import dequantize, scaled_codes

from .moe_experts import ACTIVATIONS, OAI, Dims, Experts, rows_of, serving, stored
from .moe_layers import SHAPES, SUFFIXES, Checkpoint, choices, load

SERVED = [(n, kind) for kind, a in ACTIVATIONS.items() for n in serving(a)]
UNGATED = serving(RELU2)
every_shape = pytest.mark.parametrize("dims", SHAPES, ids=str)


def loaded(runner: str, dims: Dims, activation: ExpertActivation, **how: Any) -> Experts:
    layer = Experts(runner, dims, activation=activation)
    load(layer, stored(dims, activation=activation, **how))
    return layer


def dense(tensors: Checkpoint, x: Tensor, weights: Tensor, ids: Tensor, activation: ExpertActivation) -> Tensor:
    """The layer in float64 from the checkpoint, activations as they are."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t, expert in ((t, e) for t in range(x.shape[0]) for e in range(ids.shape[1])):
        number = int(ids[t, expert])
        mats = {
            s: dequantize(*(tensors[number, s, f] for f in SUFFIXES[:3])) for n, s, f in tensors if n == number and f == "weight"
        }
        row = x[t].double()
        gate, up = mats["w1"].double() @ row, mats["w3"].double() @ row if "w3" in mats else None
        if up is None:
            hidden = torch.relu(gate) ** 2
        else:
            limit = activation.limit or math.inf
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            hidden = gate / (1 + torch.exp(-activation.alpha * gate)) * (up + activation.beta)
        out[t] += weights[t, expert] * (mats["w2"].double() @ hidden)
    return out


@every_shape
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_reference_is_the_layer_within_quantization_noise(kind: str, dims: Dims) -> None:
    # A limit which values meet: outputs of the first GEMM are about 1.
    activation = ExpertActivation(alpha=1.702, beta=1.0, limit=0.75) if kind == "oai" else ACTIVATIONS[kind]
    tensors, (x, weights, ids) = stored(dims, activation=activation), choices(4, *dims[:2])
    expected = dense(tensors, x, weights, ids, activation)
    exact = Experts("reference", dims, activation=activation, input_scale=False)
    load(exact, {key: t for key, t in tensors.items() if key[2] != "input_scale"})
    torch.testing.assert_close(exact(x, weights, ids).double(), expected, rtol=1e-3, atol=1e-3)
    assert signal_to_noise(loaded("reference", dims, activation)(x, weights, ids).double(), expected) > 10


@every_shape
@pytest.mark.parametrize("runner", UNGATED)
def test_an_emulator_reads_ungated_experts_from_kernel_bytes(runner: str, dims: Dims) -> None:
    tensors, layer = stored(dims, activation=RELU2), loaded(runner, dims, RELU2)
    for expert in range(dims[0]):
        found = emulated(layer, moe_runner(runner), layer.nvfp4_moe_shape, expert)  # type: ignore[arg-type]
        for name, values in zip(("w13", "w2"), found, strict=True):
            rows = scaled_codes(rows_of(tensors, expert, name, "weight"), rows_of(tensors, expert, name, "weight_scale"))
            assert torch.equal(values, rows.double())


@pytest.mark.parametrize("runner, kind", SERVED)
@pytest.mark.parametrize("dims", [SHAPES[1], SHAPES[2]], ids=str)
def test_the_emulated_kernel_computes_the_layer_with_its_numbers_where_the_kernel_has_them(
    runner: str, kind: str, dims: Dims
) -> None:
    """The exact layer against bytes, factors and numbers, each used as the kernel's documentation says."""
    activation = ExpertActivation(alpha=1.702, beta=0.5, limit=0.75) if kind == "oai" else ACTIVATIONS[kind]
    chosen, (x, weights, ids) = moe_runner(runner), choices(4, *dims[:2])
    tensors, layer = stored(dims, activation=activation), loaded(runner, dims, activation)
    found = layer_output(layer, chosen, layer.nvfp4_moe_shape, x, weights, ids)  # type: ignore[arg-type]
    expected = dense(tensors, x, weights, ids, activation)
    assert signal_to_noise(found, expected) > (60 if chosen.input_scales is InputScales.NONE else 10)
    if chosen.input_scales is InputScales.ONE:
        reference = loaded("reference", dims, activation)(x, weights, ids)
        assert signal_to_noise(found, reference.double()) > 55
        if kind == "oai":  # the bar can be missed
            assert signal_to_noise(found, dense(tensors, x, weights, ids, ExpertActivation())) < 10


@pytest.mark.parametrize("runner", UNGATED)
def test_ungated_parameters_have_the_shapes_of_sglang(runner: str) -> None:
    e, h, i = SHAPES[1]
    layer = Experts(runner, (e, h, i), activation=RELU2, ep_size=2)
    shapes = {n: tuple(p.shape) for n, p in layer.named_parameters()}
    assert shapes["w13_weight"] == (e, i, h // 2) and shapes["w13_weight_scale"] == (e, i, h // 16)
    assert (
        shapes["w13_weight_scale_2"] == (e,) and shapes["w13_input_scale"] == (2 * e, 1) and shapes["w2_input_scale"] == (2 * e,)
    )


@pytest.mark.parametrize("dims", [(2, 128, 128), (8, 256, 384)], ids=str)
def test_ungated_bytes_are_those_of_flashinfers_preparation(dims: Dims) -> None:
    core = pytest.importorskip("flashinfer.fused_moe.core")
    unswizzle = pytest.importorskip("flashinfer.gemm.gemm_bf16_fp4")._unswizzle_sf_128x4
    tensors = stored(dims, activation=RELU2)
    layers = {n: loaded(f"flashinfer_{n}", dims, RELU2) for n in ("trtllm_routed", "cutlass", "cutedsl")}
    for e in range(dims[0]):
        for suffix, kernel in (("weight", "{}_weight_prepared"), ("weight_scale", "{}_blockscale_swizzled")):
            for name in ("w13", "w2"):
                rows = rows_of(tensors, e, name, suffix).view(torch.uint8)
                shuffle = (
                    core._maybe_get_cached_w3_w1_permute_indices({}, rows, 128, is_gated_act_gemm=False)
                    if name == "w13"
                    else core.get_w2_permute_indices_with_cache({}, rows, 128)
                )
                for which, layer in layers.items():
                    found = layer.get_buffer(kernel.format(name))[e].view(torch.uint8)
                    if suffix == "weight_scale":
                        found = unswizzle(found, *rows.shape).view(torch.uint8)
                    assert torch.equal(found, rows[shuffle] if which == "trtllm_routed" else rows), (which, name, suffix)


# -- scalars ---------------------------------------------------------------------------------------------------------------


def largest(tensors: Checkpoint, *shards: str) -> Tensor:
    return torch.stack([t for (_, s, f), t in tensors.items() if f == "input_scale" and s in shards]).max()


@pytest.mark.parametrize("runner", UNGATED)
def test_ungated_scalars_are_those_of_the_table(runner: str) -> None:
    dims = SHAPES[1]
    tensors, layer = stored(dims, activation=RELU2), loaded(runner, dims, RELU2)
    a1, a2 = largest(tensors, "w1"), largest(tensors, "w2")
    s1, s2 = (torch.stack([tensors[e, s, "weight_scale_2"] for e in range(dims[0])]) for s in ("w1", "w2"))
    expected = {
        InputScales.NONE: {"g1_alphas": s1, "g2_alphas": s2, "g1_scale_c": torch.ones(dims[0])},
        InputScales.ONE: {"g1_alphas": a1 * s1, "g2_alphas": a2 * s2, "g1_scale_c": (1 / a2).expand(dims[0])},
        InputScales.DIVIDING: {
            "g1_alphas": s1,
            "g2_alphas": a2 * s2,
            "w13_input_scale_max": a1[None],
            "w2_input_scale_max": a2[None],
        },
    }[moe_runner(runner).input_scales]
    found = {n: b for n, b in layer.named_buffers() if b.dtype is torch.float32 and not n.endswith("quant")}
    assert found.keys() == expected.keys() and all(torch.equal(found[n], value) for n, value in expected.items())


def trtllm_epilogue(gate: Tensor, up: Tensor, layer: Experts, expert: int) -> Tensor:
    """What FlashInfer's first GEMM writes from raw sums, by the order of ``gatedSilu`` and of its output scales."""
    limit, alpha, beta = (getattr(layer, n)[expert] for n in ("gemm1_clamp_limit", "gemm1_alpha", "gemm1_beta"))
    gate, up = torch.minimum(gate, limit), torch.clamp(up, -limit, limit)
    true = gate * layer.g1_alphas[expert]  # type: ignore[index]
    return true * torch.sigmoid(alpha * true) * (up + beta) * layer.g1_scale_c[expert]  # type: ignore[index]


def test_trtllm_numbers_are_of_raw_sums() -> None:
    dims, activation = SHAPES[1], ExpertActivation(alpha=1.702, beta=0.5, limit=1.25)
    tensors, layer = stored(dims, activation=activation), loaded("flashinfer_trtllm_routed", dims, activation)
    a1, a2 = largest(tensors, "w1", "w3"), largest(tensors, "w2")
    random = torch.Generator().manual_seed(0)
    for e in range(dims[0]):
        factor = a1 * tensors[e, "w1", "weight_scale_2"]
        gate, up = (torch.randn(1000, generator=random) * 2 for _ in range(2))
        found = trtllm_epilogue(gate / factor, up / factor, layer, e)
        torch.testing.assert_close(found, activation(gate, up) / a2)
        assert math.isclose(float(layer.gemm1_clamp_limit[e]), float(1.25 / factor), rel_tol=1e-6)  # type: ignore[index]


def test_trtllms_beta_is_in_units_of_the_up_half_where_scales_are_untied_and_nothing_is_clamped() -> None:
    dims, activation = SHAPES[1], ExpertActivation(alpha=1.5, beta=0.5)
    tensors = stored(dims, activation=activation, untied=True)
    layer = loaded("flashinfer_trtllm_routed", dims, activation, untied=True)
    assert "gemm1_clamp_limit" not in dict(layer.named_buffers())
    a1 = largest(tensors, "w1", "w3")
    for e in range(dims[0]):
        expected = 0.5 / (a1 * tensors[e, "w3", "weight_scale_2"])
        assert math.isclose(float(layer.gemm1_beta[e]), float(expected), rel_tol=1e-6)  # type: ignore[index]


def test_cutlass_numbers_are_of_true_values() -> None:
    layer = loaded("flashinfer_cutlass", SHAPES[1], OAI)
    for name, value in (("gemm1_alpha", 1.702), ("gemm1_beta", 1.0), ("gemm1_clamp_limit", 7.0)):
        assert torch.equal(layer.get_buffer(name), torch.full((SHAPES[1][0],), value))


@pytest.mark.parametrize("runner", serving())
def test_plain_swiglu_has_no_numbers_in_memory(runner: str) -> None:
    assert not [n for n, _ in Experts(runner, SHAPES[0]).named_buffers() if n.startswith("gemm1")]


def test_scalars_are_those_of_sglang() -> None:
    trtllm = pytest.importorskip("sglang.srt.layers.moe.moe_runner.flashinfer_trtllm")
    modelopt = pytest.importorskip("sglang.srt.layers.quantization.modelopt_quant")
    for activation in (OAI, RELU2):
        layer = loaded("flashinfer_trtllm_routed", SHAPES[1], activation)
        a1 = 1.0 / layer.get_buffer("w13_input_scale_quant")
        alphas = modelopt._compute_gemm1_alphas(layer.get_parameter("w13_weight_scale_2").detach().clone(), a1, activation.gated)
        scale_c = trtllm._compute_g1_scale_c(layer.get_buffer("w2_input_scale_quant"), *alphas, activation.gated)
        torch.testing.assert_close(layer.get_buffer("g1_alphas"), alphas[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(layer.get_buffer("g1_scale_c"), scale_c, rtol=1e-6, atol=0)


# -- refusals and calls --------------------------------------------------------------------------------------------------------


class Plain(MoERunner):
    """A runner of plain SwiGLU."""

    name = "plain"
    layout = moe_runner("reference").layout

    def apply(self, *args: Any) -> Tensor:
        raise AssertionError


def test_what_a_runner_cannot_serve_is_refused_by_name_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    from aliasparam_nvfp4.moe import runners

    known = {**runners.moe_runners(), "plain": Plain()}
    monkeypatch.setattr(runners, "moe_runners", lambda: known)
    for activation, reason in ((RELU2, "no relu2, only swiglu"), (OAI, "no alpha, beta or limit")):
        with pytest.raises(BackendError, match=rf"plain: (?s:.)*{reason}(?s:.)*reference"):
            NvFp4MoEMethod("plain", activation=activation)
        with pytest.raises(BackendError, match=reason):
            NvFp4MoEMethod("reference", activation=activation, retarget_to=("plain",))
        assert NvFp4MoEMethod("auto", activation=activation).backend.name != "plain"
    NvFp4MoEMethod("plain")
    with pytest.raises(BackendError, match=r"flashinfer_cutedsl_masked: (?s:.)*no relu2"):
        NvFp4MoEMethod("flashinfer_cutedsl_masked", activation=RELU2)


@pytest.mark.parametrize("runner, kind", [(n, k) for n, k in SERVED if n in ("flashinfer_trtllm_routed", "flashinfer_cutlass")])
@every_shape
def test_the_call_tells_flashinfer_the_activation(runner: str, kind: str, dims: Dims, monkeypatch: pytest.MonkeyPatch) -> None:
    fi = pytest.importorskip("flashinfer")
    activation, chosen = ACTIVATIONS[kind], moe_runner(runner)
    layer = loaded(runner, dims, activation)
    h, i = layer.nvfp4_moe_shape.padded(chosen.layout)  # type: ignore[operator, union-attr]
    signature, calls = inspect.signature(getattr(fi.fused_moe, chosen.call)), []

    def kernel(*args: Any, **kwargs: Any) -> Any:
        calls.append(signature.bind(*args, **kwargs).arguments)
        return [torch.zeros(3, h, dtype=torch.bfloat16)]

    codes = torch.zeros(3, h // 2, dtype=torch.uint8), torch.zeros(3, h // 16, dtype=torch.uint8)
    monkeypatch.setattr(fi, "fp4_quantize", lambda *args, **kwargs: codes)
    monkeypatch.setattr(fi.fused_moe, chosen.call, kernel)
    x, weights, ids = choices(3, *dims[:2])
    assert chosen.apply(layer, x.bfloat16(), weights, ids, layer.nvfp4_moe_shape).shape == (3, dims[1])  # type: ignore[arg-type]
    (call,) = calls
    rows = 2 * i if activation.gated else i
    assert call["activation_type"] == (
        fi.fused_moe.ActivationType.Swiglu if activation.gated else fi.fused_moe.ActivationType.Relu2
    )
    prefix, names = ("gemm1", ("alpha", "beta", "clamp_limit"))
    if runner == "flashinfer_cutlass":
        prefix, names = ("swiglu", ("alpha", "beta", "limit"))
        _, scales, _, _, scales2, _ = call["quant_scales"]
        assert tuple(call["fc1_expert_weights"].shape) == (dims[0], rows, h // 16)
        # binding.cu, getQuantParams: exactly so many rows, and for the swizzle whole tiles of 128
        assert scales.shape[1] == (2 if activation.gated else 1) * (-(-i // 64) * 64)
        assert activation.gated or scales.shape[1] % 128 == 0
        assert tuple(scales2.shape) == (dims[0], -(-h // 128) * 128, i // 64)
    else:
        assert tuple(call["gemm1_weights"].shape) == (dims[0], rows, h // 2) and rows % 128 == 0
    given = {n: call[f"{prefix}_{n}"] for n in names}
    assert all((value is not None) == (kind == "oai") for value in given.values())
    if kind == "oai":
        assert all(value.shape == (dims[0],) and value.dtype is torch.float32 for value in given.values())


def test_cutedsl_gets_the_numbers_as_python_floats() -> None:
    pytest.importorskip("flashinfer")
    from aliasparam_nvfp4.moe.runners.flashinfer_cutedsl import _flashinfer_activation

    assert _flashinfer_activation(OAI) == {"activation_type": 3, "swiglu_alpha": 1.702, "swiglu_beta": 1.0, "swiglu_limit": 7.0}
    assert _flashinfer_activation(RELU2) == {"activation_type": 6}
    assert "swiglu_limit" not in _flashinfer_activation(ExpertActivation(beta=1.0))


@pytest.mark.parametrize("limit", [None, 7.0, 30.0, 50.0, 2000.0])
def test_law_1_the_limit_of_a_class_of_experts_is_found_wherever_it_is(limit: float | None) -> None:
    """Values beyond 40 were not tried, so a class that holds its sums below 50 was served without its limit."""
    pytest.importorskip("transformers")
    from aliasparam_nvfp4.integrations.transformers.activation import expert_activation

    class Held(torch.nn.Module):
        limit: float | None = None

        def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
            gate, up = gate_up.chunk(2, -1)
            if self.limit is not None:
                gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
            return torch.nn.functional.silu(gate) * up

    module = Held()
    module.limit = limit
    assert expert_activation(module) == ExpertActivation(limit=limit)
    module.__dict__["limit"], Held._apply_gate = None, _bounded  # type: ignore[method-assign]
    assert expert_activation(module) is None, "a bound that it does not tell"


def _bounded(self: torch.nn.Module, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate.clamp(max=100.0)) * up
