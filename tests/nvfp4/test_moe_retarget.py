"""Moving loaded experts to another runner: in place, and as if they had been created there."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from aliasparam import checkpoint_state_dict
from aliasparam.errors import PointerError
from aliasparam_nvfp4 import COMPRESSED_TENSORS, NvFp4LinearMethod, retarget, retarget_experts
from aliasparam_nvfp4.errors import BackendError, ScaleError
from aliasparam_nvfp4.moe.activation import SWIGLU, ExpertActivation
from aliasparam_nvfp4.moe.runners import moe_runner
from aliasparam_nvfp4.moe.scales import InputScales

from .moe_experts import ACTIVATIONS, OAI, Experts, pointers, serving, stored
from .moe_layers import SHAPES, choices, load, names


def read_by(layer: Experts) -> dict[str, bytes]:
    """The names which the layer's runner reads, and the checkpoint's."""
    every = names(layer)
    scalars = layer.nvfp4_moe_declared.derivations(layer.nvfp4_runner)  # type: ignore[operator, union-attr]
    buffers = {n for n, _ in layer.named_buffers()}
    return {
        n: b for n, b in every.items() if n not in buffers or n in {d.name for d in scalars} or "13_w" in n or "prepared" in n
    }


def alike(activation: ExpertActivation = SWIGLU, **how: Any) -> list[str]:
    """Runners among which a layer can be moved: those with scales for each expert have quants of another shape."""
    return [n for n in serving(activation, **how) if moe_runner(n).input_scales is not InputScales.EACH]


def pairs(activation: ExpertActivation, **how: Any) -> list[tuple[str, str]]:
    """Every runner to the next of them and back: how bytes are moved between any two orders is a law of the core."""
    found = alike(activation, **how)
    return [pair for old, new in itertools.pairwise(found) for pair in ((old, new), (new, old))]


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dims", [SHAPES[0], SHAPES[2]], ids=str)
def test_retargeted_experts_are_those_created_there_and_nothing_moves(kind: str, dims: Any) -> None:
    activation = ACTIVATIONS[kind]
    for old, new in pairs(activation):
        layer = Experts(old, dims, activation=activation, retarget_to=(new,))
        load(layer, stored(dims, activation=activation))
        before, addresses = names(layer), pointers(layer)
        assert retarget_experts(layer, new) == 1 and retarget_experts(layer, new) == 0
        oracle = Experts(new, dims, activation=activation)
        load(oracle, stored(dims, activation=activation))
        assert read_by(layer) == read_by(oracle), (old, new)
        assert {n: p[0] for n, p in pointers(layer).items()} == {n: p[0] for n, p in addresses.items()}
        load(layer, stored(dims, 1, activation=activation))
        load(oracle, stored(dims, 1, activation=activation))
        assert read_by(layer) == read_by(oracle), (old, new)
        load(layer, stored(dims, activation=activation))
        assert retarget_experts(layer, old) == 1
        assert names(layer) == before and pointers(layer) == addresses


@pytest.mark.parametrize("how", [{"checkpoint": COMPRESSED_TENSORS}, {"input_scale": False}], ids=["reciprocals", "W4A16"])
def test_retargeting_keeps_the_kind_of_checkpoint(how: dict[str, Any]) -> None:
    dims = SHAPES[1]
    fmt = {"fmt": how["checkpoint"]} if "checkpoint" in how else how
    input_scale = how.get("input_scale", True)
    for old, new in pairs(SWIGLU, input_scale=input_scale):
        layer, oracle = Experts(old, dims, retarget_to=(new,), **how), Experts(new, dims, **how)
        load(layer, stored(dims, **fmt))
        exported = {n: t.clone() for n, t in checkpoint_state_dict(layer).items()}
        retarget_experts(layer, new)
        load(oracle, stored(dims, **fmt))
        assert read_by(layer) == read_by(oracle)
        now = checkpoint_state_dict(layer)
        assert all(torch.equal(now[n].contiguous().view(torch.uint8), t.view(torch.uint8)) for n, t in exported.items())


def test_the_reference_answers_the_same_after_a_round_over_all_runners() -> None:
    dims = SHAPES[0]
    others = [n for n in alike() if n != "reference"]
    layer = Experts("reference", dims, retarget_to=others)
    load(layer, stored(dims))
    x = choices(4, *dims[:2])
    expected = layer(*x)
    for name in (*others, "reference"):
        retarget_experts(layer, name)
    assert torch.equal(layer(*x), expected)


def test_linear_layers_and_experts_are_moved_by_a_function_each() -> None:
    model = nn.Module()
    model.experts, model.linear = Experts("flashinfer_cutlass", SHAPES[0]), nn.Module()
    method = NvFp4LinearMethod("flashinfer_cutlass")
    method.create_weights(model.linear, 128, [128], 128, 128, torch.bfloat16)
    assert retarget(model, "flashinfer_trtllm") == 1 and model.experts.nvfp4_runner.name == "flashinfer_cutlass"
    assert retarget_experts(model, "flashinfer_cutedsl") == 1 and method.backend.name == "flashinfer_cutlass"
    assert model.linear.nvfp4_backend.name == "flashinfer_trtllm"


def test_a_layer_that_was_not_loaded_yet_is_moved_too() -> None:
    dims = SHAPES[2]
    layer, oracle = Experts("flashinfer_cutlass", dims, retarget_to=("reference",)), Experts("reference", dims)
    assert retarget_experts(layer, "reference") == 1
    for each in (layer, oracle):
        load(each, stored(dims))
    assert read_by(layer) == read_by(oracle)


# -- refused by name, with nothing moved ------------------------------------------------------------------------------------


def unmoved(layer: Experts, runner: str, error: type[Exception], match: str) -> None:
    model = nn.ModuleList([Experts("flashinfer_cutlass", SHAPES[0], retarget_to=alike()), layer])
    load(model[0], stored(SHAPES[0]))
    before = names(model)
    with pytest.raises(error, match=match):
        retarget_experts(model, runner)
    assert names(model) == before
    assert [m.nvfp4_runner.name for m in model] == ["flashinfer_cutlass", layer.nvfp4_runner.name]  # type: ignore[union-attr]


def test_scalars_without_memory_are_refused_by_name() -> None:
    layer = Experts("flashinfer_cutile", SHAPES[0])
    load(layer, stored(SHAPES[0]))
    unmoved(layer, "reference", BackendError, r'(?s)w13_input_scale_quant.*retarget_to=\("reference",\)')


def test_scalars_of_another_shape_are_refused_at_creation() -> None:
    with pytest.raises(BackendError, match=r"(?s)w13_input_scale_quant \[1\].*\[2\]"):
        Experts("flashinfer_cutlass", SHAPES[0], retarget_to=("flashinfer_cutedsl_masked",))


def test_numbers_without_memory_are_refused_by_name() -> None:
    layer = Experts("flashinfer_cutedsl", SHAPES[0], activation=OAI)
    load(layer, stored(SHAPES[0]))
    unmoved(layer, "flashinfer_trtllm_routed", BackendError, "gemm1_alpha, gemm1_beta, gemm1_clamp_limit")


def test_untied_scales_are_refused_by_a_runner_with_one_factor() -> None:
    layer = Experts("reference", SHAPES[0], retarget_to=alike())
    load(layer, stored(SHAPES[0], untied=True))
    unmoved(layer, "flashinfer_cutedsl", ScaleError, "flashinfer_cutedsl: w13_weight_scale_2, expert 0")


def test_runners_that_need_activation_scales_are_refused_without_them() -> None:
    layer = Experts("reference", SHAPES[0], input_scale=False)
    load(layer, stored(SHAPES[0], input_scale=False))
    unmoved(layer, "flashinfer_cutlass", BackendError, "activation scales")


def test_padding_without_room_is_refused_by_name_and_no_layer_is_moved() -> None:
    layers = [Experts("reference", SHAPES[2], retarget_to=room) for room in (("flashinfer_cutlass",), ())]
    for layer in layers:
        load(layer, stored(SHAPES[2]))
    before = [names(layer) for layer in layers]
    with pytest.raises(PointerError, match=r'(?s)w13_weight.*room.*retarget_to=\("flashinfer_cutlass",\) of NvFp4MoEMethod'):
        retarget_experts(nn.ModuleList(layers), "flashinfer_cutlass")
    assert [names(layer) for layer in layers] == before


def test_what_no_kernel_reads_refuses_nothing() -> None:
    """TRT-LLM's clamp limit needs tied scales; a layer which merely may be moved there takes untied ones until it is."""
    layer = Experts("reference", SHAPES[0], activation=OAI, retarget_to=("flashinfer_trtllm_routed",))
    load(layer, stored(SHAPES[0], untied=True))
    assert not layer.get_buffer("gemm1_clamp_limit").any()
    with pytest.raises(ScaleError, match="one clamp limit"):
        retarget_experts(layer, "flashinfer_trtllm_routed")
