"""Input scales that are missing: refused, the largest of the layer, or computed at run time."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from aliasparam import process, registry_of, reload
from aliasparam_nvfp4 import NvFp4LinearMethod, NvFp4MoEMethod, retarget
from aliasparam_nvfp4.checkpoint.format import COMPRESSED_TENSORS, MODELOPT, CheckpointFormat
from aliasparam_nvfp4.errors import BackendError, ScaleError
from aliasparam_nvfp4.linear.backends import linear_backends
from aliasparam_nvfp4.linear.emulate import linear as emulated
from aliasparam_nvfp4.linear.verify import random_weights, signal_to_noise
from aliasparam_nvfp4.moe import retarget_experts
from aliasparam_nvfp4.moe.emulate import layer_output
from aliasparam_nvfp4.moe.runners import MoENames, moe_runners
from aliasparam_nvfp4.quantize.codec import dequantize, quantize_activation, scaled_codes

from .interpreter import interpreted
from .moe_experts import Experts, stored
from .moe_layers import SHAPES, checkpoint, choices, load

K, PARTITIONS = 64, (48, 32)
POLICIES = ("dynamic", "dynamic-tensor")


def layer_with(
    inputs: tuple[float, float] | None, missing: Any, backend: str = "reference", names: CheckpointFormat = MODELOPT, **how: Any
) -> tuple[NvFp4LinearMethod, nn.Module]:
    """A fused layer whose partitions have these stored input scales; None: the checkpoint has none."""
    method, layer = (
        NvFp4LinearMethod(backend, missing_input_scale=missing, input_scale=inputs is not None, checkpoint=names, **how),
        nn.Module(),
    )
    method.create_weights(layer, K, PARTITIONS, K, sum(PARTITIONS), torch.float32)
    tensors = random_weights(PARTITIONS, K, 0, torch.device("cpu"))
    stored = {"weight": names.weight, "weight_scale": names.block_scale}
    layer_tensors = {stored[n]: t for n, t in tensors.items() if n in stored}
    total = tensors["weight_scale_2"]
    layer_tensors[names.weight_global] = 1 / total if names.reciprocal else total
    if inputs is not None:
        layer_tensors[names.input_global] = torch.tensor(inputs)
    with reload(layer) as session:
        session.load(layer_tensors)
    return method, layer


def activations(rows: int = 5) -> Tensor:
    """Rows of very different sizes, one of zeros."""
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(3)) * torch.logspace(-3, 3, rows).unsqueeze(1)
    x[1] = 0
    return x


def by_hand(x: Tensor, missing: str) -> Tensor:
    """The layer in float64: each row (or all) quantized so that its largest block scale is 448."""
    tensors = random_weights(PARTITIONS, K, 0, torch.device("cpu"))
    weight = dequantize(tensors["weight"], tensors["weight_scale"], tensors["weight_scale_2"][0]).double()
    out = []
    for row in x:
        amax = (x if missing == "dynamic-tensor" else row).abs().max()
        inverse = 2688.0 / amax if amax else torch.tensor(1.0)
        codes, scales = quantize_activation(row.unsqueeze(0), inverse.reshape(1))
        out.append(weight @ (scaled_codes(codes, scales)[0].double() / inverse))
    return torch.stack(out)


@pytest.mark.parametrize("missing", POLICIES)
@pytest.mark.parametrize("inputs", [None, (0.0, 0.004), (float("nan"), float("inf"))], ids=["absent", "one is 0", "no numbers"])
def test_a_missing_scale_is_computed_at_run_time(missing: str, inputs: tuple[float, float] | None) -> None:
    for names in (MODELOPT, COMPRESSED_TENSORS):
        method, layer = layer_with(inputs, missing, names=names)
        x = activations()
        assert signal_to_noise(method.apply(layer, x).double(), by_hand(x, missing)) > 100


def test_each_token_has_a_scale_of_its_own_and_a_call_has_one() -> None:
    x = activations()
    for missing, alone in (("dynamic", True), ("dynamic-tensor", False)):
        method, layer = layer_with(None, missing)
        together, apart = method.apply(layer, x), torch.cat([method.apply(layer, row.unsqueeze(0)) for row in x])
        assert torch.equal(together, apart) is alone


@pytest.mark.parametrize("missing", [*POLICIES, "max"])
def test_stored_scales_count_as_without_a_policy_and_may_come_and_go(missing: str) -> None:
    x = activations()
    method, layer = layer_with((0.002, 0.004), missing)
    plain_method, plain = layer_with((0.002, 0.004), "refuse")
    first = method.apply(layer, x)
    assert torch.equal(first, plain_method.apply(plain, x))

    with torch.no_grad():
        layer.get_parameter("input_scale").copy_(torch.tensor([0.0, 0.004]))
    process(layer)
    expected = first if missing == "max" else by_hand(x, missing).float()
    assert signal_to_noise(method.apply(layer, x).double(), expected.double()) > 100
    with torch.no_grad():
        layer.get_parameter("input_scale").copy_(torch.tensor([0.002, 0.004]))
    process(layer)
    assert torch.equal(method.apply(layer, x), first)


@pytest.mark.parametrize("fmt", [MODELOPT, COMPRESSED_TENSORS], ids=["ModelOpt", "compressed-tensors"])
@pytest.mark.parametrize("lacking", [0.0, float("nan")])
def test_the_largest_counts_for_an_expert_without_one_whichever_way_scales_point(fmt: CheckpointFormat, lacking: float) -> None:
    """On the runner that takes each expert's own."""
    tensors = stored(SHAPES[1], fmt=fmt)
    inputs = fmt.input_global
    for shard in ("w1", "w3", "w2"):
        tensors[1, shard, inputs] = torch.full_like(tensors[1, shard, inputs], lacking)
    layer = Experts("flashinfer_cutedsl_masked", SHAPES[1], checkpoint=fmt, missing_input_scale="max")
    load(layer, tensors)
    for name, shards in (("w13", ("w1", "w3")), ("w2", ("w2",))):
        scales = torch.stack([tensors[e, s, inputs].reshape(()) for e in (0, 2) for s in shards])
        largest = scales.min() if fmt.reciprocal else 1 / scales.max()
        assert torch.equal(layer.get_buffer(f"{name}_input_scale_quant")[1], largest), name


def test_without_a_policy_or_a_largest_they_are_refused() -> None:
    for missing, inputs in (("refuse", (0.0, 0.004)), ("max", (0.0, 0.0))):
        with pytest.raises(ScaleError, match="missing_input_scale"):
            layer_with(inputs, missing)
    with pytest.raises(ScaleError, match="one of refuse, max, dynamic, dynamic-tensor"):
        NvFp4LinearMethod("reference", missing_input_scale=cast(Any, "guess"))
    with pytest.raises(ScaleError, match="one of refuse, max, dynamic, dynamic-tensor"):
        NvFp4MoEMethod("reference", missing_input_scale=cast(Any, "guess"))


def test_backends_that_cannot_refuse_by_name() -> None:
    can = {b.name for b in linear_backends().values() if b.weight_only or b.dynamic_scales}
    assert {"reference", "triton", "triton_w4a4", "triton_shuffled"} <= can and "flashinfer_cutlass" not in can
    _, layer = layer_with((0.0, 0.004), "dynamic")
    for name in linear_backends().keys() - can:
        with pytest.raises(BackendError, match=f"{name}: this backend cannot compute activation scales at run time"):
            NvFp4LinearMethod(name, missing_input_scale="dynamic")
        with pytest.raises(BackendError, match="at run time"):
            retarget(layer, name)
    experts = nn.Module()
    NvFp4MoEMethod("reference", missing_input_scale="dynamic").create_weights(experts, 2, 64, 32, torch.float32)
    for runner in moe_runners().values():
        if runner.needs_input_scale:
            with pytest.raises(BackendError, match="at run time"):
                NvFp4MoEMethod(runner.name, missing_input_scale="dynamic")
            with pytest.raises(BackendError, match="at run time"):
                retarget_experts(experts, runner.name)


@pytest.mark.parametrize("missing", POLICIES)
def test_the_emulator_gives_the_numbers_of_the_backend(missing: str) -> None:
    method, layer = layer_with((0.0, 0.0), missing)
    x = activations()
    registry = registry_of(layer)
    assert registry is not None and float(layer.get_buffer("alpha")) == float(layer.get_buffer("input_scale_inv")) == 0.0
    amax = x.abs().amax(-1, keepdim=True) if missing == "dynamic" else x.abs().max().reshape(1, 1)
    inverse = 2688 / amax.clamp(min=1e-30)
    weight, scales = layer.get_buffer("weight_prepared"), layer.get_buffer("weight_scale_interleaved")
    out = emulated("plain", x, weight, scales, layer.get_buffer("weight_alpha") / inverse, inverse, n=sum(PARTITIONS))

    assert signal_to_noise(method.apply(layer, x).double(), out) > 100


@pytest.mark.parametrize("missing", POLICIES)
def test_experts_without_scales_are_quantized_at_run_time(missing: str) -> None:
    e, h, i = SHAPES[1]
    tensors = checkpoint(e, h, i)
    tensors[1, "w3", "input_scale"] = torch.tensor(0.0)
    tensors[2, "w2", "input_scale"] = torch.tensor(float("nan"))
    layer = nn.Module()
    method = NvFp4MoEMethod("reference", missing_input_scale=cast(Any, missing))
    method.create_weights(layer, e, h, i, torch.float32)
    layer.__dict__["method"] = method
    load(layer, tensors)
    x, weights, ids = choices(6, e, h)

    found = method.apply(layer, x, weights, ids).double()

    assert signal_to_noise(found, experts_by_hand(tensors, x, weights, ids, missing)) > 80
    names, shape = cast(MoENames, layer), layer.__dict__["nvfp4_moe_shape"]
    assert signal_to_noise(found, layer_output(names, moe_runners()["reference"], shape, x, weights, ids)) > 80


def experts_by_hand(tensors: Any, x: Tensor, weights: Tensor, ids: Tensor, missing: str) -> Tensor:
    def quantized(rows: Tensor, whole: Tensor) -> Tensor:
        amax = whole.abs().max() if missing == "dynamic-tensor" else rows.abs().amax(-1, keepdim=True)
        inverse = (2688 / amax).float().reshape(-1, 1)
        return scaled_codes(*quantize_activation(rows, inverse)).double() / inverse

    out = torch.zeros(x.shape, dtype=torch.float64)
    for expert in range(ids.max() + 1):
        token, choice = (ids == expert).nonzero(as_tuple=True)
        w1, w3, w2 = (
            dequantize(*(tensors[expert, s, f] for f in ("weight", "weight_scale", "weight_scale_2"))).double()
            for s in ("w1", "w3", "w2")
        )
        rows = quantized(x[token], x)
        hidden = (nn.functional.silu(rows @ w1.T) * (rows @ w3.T)).float()
        out.index_add_(0, token, (quantized(hidden, hidden) @ w2.T) * weights[token, choice, None].double())
    return out


def main() -> None:
    """The Triton backends under their interpreter."""
    for missing in POLICIES:
        for name, expected in (("triton_w4a4", "by hand"), ("triton", "weights alone"), ("triton_shuffled", "weights alone")):
            method, layer = layer_with((0.0, 0.004), missing, name)
            x = activations().to(torch.bfloat16)
            reference_method, reference = layer_with(None, "refuse")
            wanted = by_hand(x.float(), missing) if expected == "by hand" else reference_method.apply(reference, x.double())
            decibel = signal_to_noise(method.apply(layer, x).double(), wanted.double())
            assert decibel > 40, (name, missing, decibel)
    print("held")


def test_the_triton_backends_in_their_interpreter() -> None:
    pytest.importorskip("triton")
    assert "held" in interpreted("tests.nvfp4.test_missing_input_scale")


if __name__ == "__main__":
    main()
