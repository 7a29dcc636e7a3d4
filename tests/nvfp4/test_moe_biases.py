"""Biases of experts: every runner's kernel gets them where, and in the units in which, it adds them."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from aliasparam import checkpoint_state_dict, reload
from aliasparam.testing import same_bytes
from aliasparam_nvfp4 import NvFp4MoEMethod
from aliasparam_nvfp4.errors import BackendError, ScaleError
from aliasparam_nvfp4.linear.verify import signal_to_noise
from aliasparam_nvfp4.moe import GPT_OSS, RELU2, ROWS, SWIGLU, ExpertActivation, Stored, retarget_experts
from aliasparam_nvfp4.moe.emulate import layer_output
from aliasparam_nvfp4.moe.runners import MoENames, moe_runners
from aliasparam_nvfp4.quantize.codec import dequantize, quantize, quantize_activation, scaled_codes

from .moe_experts import pointers
from .moe_layers import names
from .test_moe_calls import bound as bound

CLAMPED = ExpertActivation(alpha=1.702, beta=1.0, limit=0.5)
#: With what each runner is tried: W4A4 where it quantizes activations.
ADDING = {name: runner for name, runner in moe_runners().items() if runner.biases is not None}
TRTLLM = ["flashinfer_trtllm", "flashinfer_trtllm_routed"]
#: (E, H, I): whole in every kernel's tiles, and ragged in H and I.
ALIGNED, RAGGED = (2, 128, 128), (3, 80, 48)
Dims = tuple[int, int, int]
Tensors = dict[str, Tensor]


def weights(dims: Dims, activation: ExpertActivation = CLAMPED, seed: int = 0, *, untied: bool = False) -> Tensors:
    """Rows [gate; up] under the method's names; one scale for all experts, with ``untied`` of gate and of up another for each."""
    (e, h, i), random = dims, torch.Generator().manual_seed(seed)
    halves, each = 2 if activation.gated else 1, 1 + torch.arange(e) / 8
    s13 = (each[:, None] * torch.tensor([1.0, 1.5])[:halves] if untied else torch.ones(e, halves)) * (4.0 + seed) / 2688
    s2 = (each if untied else torch.ones(e)) * 3.0 / 2688
    w13, b13, _ = quantize(torch.randn(e, halves * i, h, generator=random) / 8, s13.repeat_interleave(i, 1).unsqueeze(-1))
    w2, b2, _ = quantize(torch.randn(e, h, i, generator=random) / 8, s2.view(e, 1, 1))
    return {
        "w13_weight": w13, "w13_weight_scale": b13, "w13_weight_scale_2": s13 if activation.gated else s13[:, 0].clone(),
        "w2_weight": w2, "w2_weight_scale": b2, "w2_weight_scale_2": s2,
        "w13_input_scale": torch.full((e, halves), 0.004), "w2_input_scale": torch.full((e,), 0.006),
        "w13_bias": torch.randn(e, halves * i, generator=random).bfloat16(),
        "w2_bias": torch.randn(e, h, generator=random).bfloat16(),
    }  # fmt: skip


def by_columns(tensors: Tensors) -> Tensors:
    """The same as gpt-oss stores them; scales are one for all experts."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(("_scale_2", "input_scale")):
            found[name] = tensor.reshape(-1)[:1].clone()
            continue
        plain = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
        if name.startswith("w13"):
            plain = torch.stack(plain.chunk(2, 1), 2).flatten(1, 2)
        found[name] = (plain if name.endswith("bias") else plain.mT).contiguous().view(tensor.dtype)
    return found


def made(runner: str, dims: Dims, tensors: Tensors, activation: ExpertActivation = CLAMPED, **how: Any) -> nn.Module:
    """A loaded layer; ``tensors`` as its checkpoint has them, without what its runner has no use for."""
    quantizes = moe_runners()[runner].needs_input_scale or runner == "reference"
    method, layer = NvFp4MoEMethod(runner, activation=activation, input_scale=quantizes, bias=True, **how), nn.Module()
    method.create_weights(layer, dims[0], dims[1], dims[2] // how.get("tp_size", 1), torch.bfloat16)
    layer.method = method  # type: ignore[assignment]
    fill(layer, tensors, how.get("stored", ROWS))
    return layer


def fill(layer: Any, tensors: Tensors, stored: Stored) -> None:
    """By the engines' loader: a projection of an expert at a time, or as gpt-oss's files have them."""
    for name, param in list(layer.named_parameters()):
        shard, tensor = name.partition("_")[0], tensors[name]
        if stored.columns or name.endswith("scale_2") or name.endswith("input_scale"):
            whole = shard if stored.columns else None
            param.weight_loader(param, tensor, name, whole)
            continue
        for expert, one in enumerate(tensor):
            halves = {"w1": 0, "w3": 1} if shard == "w13" and layer.method.activation.gated else {}
            parts = {s: one.chunk(2)[n] for s, n in halves.items()} or {"w1" if shard == "w13" else "w2": one}
            for part, value in parts.items():
                param.weight_loader(param, value, name, part, expert)
    layer.method.process_weights_after_loading(layer)


def choices(dims: Dims) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    topk_weights, ids = torch.randn(5, dims[0], generator=random).softmax(-1).topk(2)
    return torch.randn(5, dims[1], generator=random).bfloat16(), topk_weights, ids.int()


def by_hand(tensors: Tensors, activation: ExpertActivation, dims: Dims, *, quantized: bool) -> Tensor:
    (x, topk_weights, ids), (e, h, i) = choices(dims), dims

    def seen(row: Tensor, name: str) -> Tensor:
        scale = tensors[f"{name}_input_scale"].max()
        return scaled_codes(*quantize_activation(row[None], 1 / scale))[0].double() * scale.double() if quantized else row

    out = torch.zeros(len(x), h, dtype=torch.float64)
    s13 = tensors["w13_weight_scale_2"].reshape(e, -1).repeat_interleave(i, 1)
    for token, (chosen, by) in enumerate(zip(ids.tolist(), topk_weights.double(), strict=True)):
        for n, weight in zip(chosen, by, strict=True):
            w13, w2 = (
                dequantize(tensors[f"{w}_weight"][n], tensors[f"{w}_weight_scale"][n], torch.ones(())).double()
                for w in ("w13", "w2")
            )
            sums = (w13 * s13[n, :, None].double()) @ seen(x[token].double(), "w13") + tensors["w13_bias"][n].double()
            hidden = activation(*sums.chunk(2)) if activation.gated else activation(sums, None)
            down = (w2 * tensors["w2_weight_scale_2"][n].double()) @ seen(hidden, "w2")
            out[token] += weight * (down + tensors["w2_bias"][n].double())
    return out


def emulated(layer: nn.Module, runner: str, dims: Dims) -> Tensor:
    return layer_output(cast(MoENames, layer), moe_runners()[runner], layer.__dict__["nvfp4_moe_shape"], *choices(dims))


def kinds(runner: str) -> list[ExpertActivation]:
    return [
        a for a in (CLAMPED, SWIGLU, RELU2) if ADDING[runner].refusal(a, input_scale=ADDING[runner].needs_input_scale) is None
    ]


# -- (a) bytes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "activation, stored", [(CLAMPED, ROWS), (RELU2, ROWS), (CLAMPED, GPT_OSS)], ids=["gated", "relu2", "gpt-oss"]
)
@pytest.mark.parametrize("dims", [ALIGNED, RAGGED, (128, 128, 64)], ids=str)
@pytest.mark.parametrize("runner", [*TRTLLM, "flashinfer_cutlass"])
def test_biases_are_those_that_flashinfer_prepares(runner: str, dims: Dims, activation: ExpertActivation, stored: Stored) -> None:
    """TRT-LLM as its tests prepare NVFP4 biases: over the product of scales, then by its index functions, as one column."""
    core = pytest.importorskip("flashinfer.fused_moe.core")
    tensors = weights(dims, activation)
    layer = made(runner, dims, by_columns(tensors) if stored.columns else tensors, activation, stored=stored)
    hidden, inner = layer.__dict__["nvfp4_moe_shape"].padded(ADDING[runner].layout)

    def padded(bias: Tensor, rows: int) -> Tensor:
        return functional.pad(bias, (0, rows - bias.shape[1]))

    halves = [padded(half, inner) for half in tensors["w13_bias"].chunk(2 if activation.gated else 1, 1)]
    first, second = torch.cat(halves[::-1], 1), padded(tensors["w2_bias"], hidden)
    if runner == "flashinfer_cutlass":
        assert torch.equal(layer.gemm1_bias, first) and torch.equal(layer.gemm2_bias, second)
        assert layer.gemm1_bias.data_ptr() == layer.get_parameter("w13_bias").data_ptr() and layer.gemm1_bias.is_contiguous()
        return
    assert layer.gemm1_bias.shape == layer.get_parameter("w13_bias").shape, "no padding where no kernel reads"
    over13 = tensors["w13_input_scale"].max() * tensors["w13_weight_scale_2"].reshape(dims[0], -1)[:, :1]
    over2 = tensors["w2_input_scale"].max() * tensors["w2_weight_scale_2"][:, None]
    pairs = core._maybe_get_cached_w3_w1_permute_indices({}, first[0].reshape(-1, 1), 128, is_gated_act_gemm=activation.gated)
    shuffled = core.get_w2_permute_indices_with_cache({}, second[0].reshape(-1, 1), 128)
    assert torch.equal(layer.gemm1_bias_raw, (first.float() / over13)[:, pairs])
    assert torch.equal(layer.gemm2_bias_raw, (second.float() / over2)[:, shuffled])


# -- (b) emulator --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [ALIGNED, RAGGED], ids=str)
@pytest.mark.parametrize("runner", sorted(ADDING))
def test_an_emulator_of_the_kernel_gives_the_layer(runner: str, dims: Dims) -> None:
    quantized = ADDING[runner].needs_input_scale or runner == "reference"
    for activation in kinds(runner):
        untied = ADDING[runner].separate_scales and activation.limit is None
        tensors = weights(dims, activation, untied=untied)
        found = emulated(made(runner, dims, tensors, activation), runner, dims)
        assert signal_to_noise(found, by_hand(tensors, activation, dims, quantized=quantized)) > 90, activation
        without = {**tensors, "w2_bias": torch.zeros_like(tensors["w2_bias"])}
        assert signal_to_noise(found, by_hand(without, activation, dims, quantized=quantized)) < 20, "the test sees biases"


@pytest.mark.parametrize("stored", [ROWS, GPT_OSS], ids=["rows", "gpt-oss"])
@pytest.mark.parametrize("runner", sorted(ADDING))
def test_parts_of_ranks_that_divide_each_expert_add_up(runner: str, stored: Stored) -> None:
    """The second bias once, the first by rows; every rank exports its part."""
    dims = (3, 80, 96)
    tensors = weights(dims)
    given = by_columns(tensors) if stored.columns else tensors
    parts = [made(runner, dims, given, stored=stored, tp_rank=rank, tp_size=2) for rank in range(2)]
    together = sum((emulated(part, runner, dims) for part in parts), torch.zeros(()))
    quantized = ADDING[runner].needs_input_scale or runner == "reference"
    assert signal_to_noise(together, by_hand(tensors, CLAMPED, dims, quantized=quantized)) > 90
    for rank, part in enumerate(parts):
        state = checkpoint_state_dict(part)
        own = given["w13_bias"].unflatten(1, (1, 2, -1) if stored.columns else (2, 2, -1))
        own = own[:, :, rank] if not stored.columns else own[:, 0, rank]
        assert same_bytes(state["w13_bias"], own.flatten(1)) and same_bytes(state["w2_bias"], given["w2_bias"])


# -- (c) call ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp_rank", [0, 1])
@pytest.mark.parametrize("runner", [*TRTLLM, "flashinfer_cutlass"])
def test_the_call_gets_them(runner: str, tp_rank: int, bound: Any) -> None:
    """Shapes and dtypes are those that ``check_moe`` (TRT-LLM) and ``runMoe`` (CUTLASS) ask for."""
    dims = (3, 80, 96)
    layer = made(runner, dims, weights(dims), tp_rank=tp_rank, tp_size=2)
    x, topk_weights, ids = choices(dims)
    for dtype in (torch.bfloat16, torch.float16):
        out = ADDING[runner].apply(cast(MoENames, layer), x.to(dtype), topk_weights, ids, layer.__dict__["nvfp4_moe_shape"])
        call = bound[-1][1]
        assert out.shape == x.shape
        if runner == "flashinfer_cutlass":
            first, second, like = (
                call["fc1_expert_biases"],
                call["fc2_expert_biases"],
                ("fc1_expert_weights", "fc2_expert_weights"),
            )
            assert (call["tp_rank"], call["tp_size"]) == (tp_rank, 2) and second is not None
        else:
            first, second, like = call["gemm1_bias"], call["gemm2_bias"], ("gemm1_weights", "gemm2_weights")
            assert (second is None) == (tp_rank == 1), "one rank adds it"
        for bias, name in ((first, like[0]), (second, like[1])):
            if bias is not None:
                assert bias.shape == call[name].shape[:2] and bias.is_contiguous()
                assert bias.dtype is (dtype if runner == "flashinfer_cutlass" else torch.float32)


def test_a_runner_whose_kernel_takes_none_says_who_does() -> None:
    for name, runner in moe_runners().items():
        if runner.biases is None:
            with pytest.raises(BackendError, match=r"(?s)it adds no biases of experts.*flashinfer_cutlass.*flashinfer_trtllm"):
                NvFp4MoEMethod(name, bias=True)


# -- laws ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [ROWS, GPT_OSS], ids=["rows", "gpt-oss"])
@pytest.mark.parametrize("runner", ["flashinfer_cutlass", "flashinfer_trtllm_routed"])
def test_law_9_a_reload_of_any_part_is_a_fresh_load(runner: str, stored: Stored) -> None:
    a, b = (weights(RAGGED, seed=seed) for seed in (0, 1))
    a, b = (by_columns(t) if stored.columns else t for t in (a, b))
    layer = made(runner, RAGGED, a, stored=stored)
    addresses = pointers(layer)
    for changed in ({"w13_bias"}, {"w13_weight_scale_2"}, {"w2_bias", "w2_input_scale"}, set(b)):
        now = {**checkpoint_state_dict(layer), **{n: b[n] for n in changed}}
        with reload(layer, scope="partial") as session:
            session.load({n: b[n] for n in changed})
        assert names(layer) == names(made(runner, RAGGED, now, stored=stored)), changed
    assert pointers(layer) == addresses
    assert all(same_bytes(t, b[n]) for n, t in checkpoint_state_dict(layer).items())


@pytest.mark.parametrize("stored", [ROWS, GPT_OSS], ids=["rows", "gpt-oss"])
def test_a_layer_moves_from_runner_to_runner(stored: Stored) -> None:
    tour = ("reference", "flashinfer_cutlass", "flashinfer_trtllm", "reference", "flashinfer_trtllm", "flashinfer_cutlass")
    tensors = by_columns(weights(RAGGED)) if stored.columns else weights(RAGGED)
    layer = made("reference", RAGGED, tensors, stored=stored, retarget_to=tour[1:3])
    addresses = {name: pointer[0] for name, pointer in pointers(layer).items()}
    for runner in tour[1:]:
        retarget_experts(layer, runner)
        oracle = names(made(runner, RAGGED, tensors, stored=stored))
        found = names(layer)
        assert all(found[name] == value for name, value in oracle.items()), runner
        assert {name: pointer[0] for name, pointer in pointers(layer).items()} == addresses


def test_a_bias_that_float32_does_not_hold_in_the_kernels_units_is_refused() -> None:
    tensors = weights(ALIGNED)
    tensors["w13_input_scale"] = torch.full_like(tensors["w13_input_scale"], 3e-36)
    made("flashinfer_cutlass", ALIGNED, tensors)
    with pytest.raises(ScaleError, match=r"(?s)w13_bias.*a bias over its input and weight scale.*flashinfer_cutlass"):
        made("flashinfer_trtllm", ALIGNED, tensors)
