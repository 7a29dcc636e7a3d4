"""What MoE layers refuse, by the name of tensor, shard and expert."""

from __future__ import annotations

import pytest
import torch

from aliasparam import checkpoint_state_dict, process, reload
from aliasparam.errors import ReloadError, StateError
from aliasparam_nvfp4 import NvFp4MoEMethod
from aliasparam_nvfp4.errors import ScaleError, ShapeError
from aliasparam_nvfp4.moe.activation import RELU2
from aliasparam_nvfp4.moe.routing import Routing
from aliasparam_nvfp4.moe.runners import moe_runner
from aliasparam_nvfp4.moe.scales import InputScales

from .moe_experts import RUNNERS, Experts, rows_of, stored
from .moe_layers import SHAPES, choices, load, names

every_runner = pytest.mark.parametrize("runner", RUNNERS)


@every_runner
def test_ill_fitting_shards_are_refused_by_name_and_expert_and_change_nothing(runner: str) -> None:
    dims = SHAPES[0]
    layer, tensors = Experts(runner, dims), stored(dims)
    load(layer, tensors)
    before, e = names(layer), dims[0]
    rows = {n: torch.stack([rows_of(tensors, k, n, "weight") for k in range(e)]) for n in ("w13", "w2")}
    for name, tensor, shard, expert, message in (
        ("w13_weight", rows["w13"][:-1], "w13", None, r"another number of experts(?s:.*)2 experts stacked(?s:.*)\[1, "),
        ("w13_weight", rows["w13"][:-1], None, None, "does not fit"),
        ("w2_weight", rows["w2"][0], "w2", None, "another number of experts"),
        ("w13_weight", rows["w13"][1].to(torch.bfloat16), "w13", 1, r"w13 of expert 1(?s:.*)torch.bfloat16"),
        ("w13_weight", rows["w13"][0][:-1], "w13", 0, "gate and up rows"),
        ("w13_weight", rows["w13"][0][:-2], "w13", 0, r"w13 of expert 0(?s:.*)\[128, 64\](?s:.*)\[127, 64\]"),
        ("w2_weight_scale", tensors[1, "w2", "weight_scale"].float(), "w2", 1, r"w2 of expert 1(?s:.*)torch.float32"),
        ("w13_weight_scale_2", torch.ones(3), "w1", 1, "w1 of expert 1"),
        ("w13_weight_scale_2", torch.ones(2, 2).double(), "w13", None, "w13 of all experts"),
        ("w2_weight", rows["w2"][0], "w2", e, "expert 0 to 1"),
        ("w2_weight", rows["w2"][0], "w4", 0, "no such shard"),
        ("w2_weight", torch.tensor(1, dtype=torch.uint8), "w2", 0, "does not fit"),
    ):
        param = layer.get_parameter(name)
        with pytest.raises(ShapeError, match=message):
            param.weight_loader(param, tensor, "model.experts", shard, expert)  # type: ignore[operator]
        assert names(layer) == before


def test_experts_without_a_gate_have_no_w3_and_nothing_to_interleave() -> None:
    layer = Experts("reference", SHAPES[0], activation=RELU2)
    param = layer.get_parameter("w13_weight")
    with pytest.raises(ShapeError, match=r"w3 of expert 0\n.*no gate"):
        param.weight_loader(param, torch.zeros(128, 64, dtype=torch.uint8), "up", "w3", 0)  # type: ignore[operator]
    with pytest.raises(ShapeError, match="interleave"):
        NvFp4MoEMethod("reference", activation=RELU2, interleaved=True)


@every_runner
@pytest.mark.parametrize("name, shard", [("w13", "w3"), ("w2", "w2")])
def test_nan_block_scales_of_a_zeroed_expert_are_refused_by_name_and_expert(runner: str, name: str, shard: str) -> None:
    dims = (5, 80, 48)
    layer, tensors = Experts(runner, dims), stored(dims)
    load(layer, tensors)
    kernel = {n: bytes(t.contiguous().view(torch.uint8).numpy().tobytes()) for n, t in layer.named_buffers()}
    good, bad = tensors[3, shard, "weight_scale"], tensors[3, shard, "weight_scale"].clone()
    bad[-1, -1] = float("nan")
    load(layer, {(3, shard, "weight_scale"): bad, (1, "w2", "weight_scale"): tensors[1, "w2", "weight_scale"]}, process=False)
    with pytest.raises(ScaleError, match=rf"(?s){name}_weight_scale, expert 3.*1\.0 as its weight global scale"):
        process(layer)
    load(layer, {(3, shard, "weight_scale"): good})
    assert kernel == {n: bytes(t.contiguous().view(torch.uint8).numpy().tobytes()) for n, t in layer.named_buffers()}


READ = dict.fromkeys(RUNNERS, ("w1 weight_scale_2", "w2 weight_scale_2"))
READ |= {n: (*READ[n], "w3 input_scale", "w2 input_scale") for n in RUNNERS if moe_runner(n).input_scales is not InputScales.NONE}


@pytest.mark.parametrize("runner, tensor", [(n, tensor) for n in RUNNERS for tensor in READ[n]])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -1.0])
def test_scales_that_are_none_are_refused_by_name_and_expert(runner: str, tensor: str, value: float) -> None:
    shard, suffix = tensor.split()
    layer, tensors = Experts(runner, SHAPES[1]), stored(SHAPES[1])
    tensors[2, shard, suffix] = torch.tensor(value)
    name = f"{'w2' if shard == 'w2' else 'w13'}_{suffix}"
    with pytest.raises(ScaleError, match=rf"(?s){name}, expert 2.*finite, > 0.*(zeros|calibrat)"):
        load(layer, tensors)


@pytest.mark.parametrize("runner", [n for n in RUNNERS if moe_runner(n).input_scales is not InputScales.NONE])
@pytest.mark.parametrize("shard", ["w13", "w2"])
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_scales_whose_product_float32_lacks_are_refused_by_name_and_expert(runner: str, shard: str, scale: float) -> None:
    """Each is a scale; their product would be a factor of 0 or infinity."""
    dims = (3, 80, 48)
    layer, tensors = Experts(runner, dims), stored(dims)
    for expert, own, suffix in [key for key in tensors if (key[1] == "w2") == (shard == "w2")]:
        if suffix == "input_scale" or (suffix == "weight_scale_2" and expert == 2):
            tensors[expert, own, suffix] = torch.tensor(scale)
    with pytest.raises(
        ScaleError, match=rf"(?s){shard}_weight_scale_2, expert [02].*what a kernel multiplies with.*together beyond"
    ):
        load(layer, tensors)


def test_what_the_message_says_to_do_with_a_zeroed_expert_serves() -> None:
    dims = SHAPES[0]
    layer, tensors = Experts("reference", dims), stored(dims)
    for shard in ("w1", "w3", "w2"):
        tensors[1, shard, "weight_scale"] = torch.zeros_like(tensors[1, shard, "weight_scale"])
        tensors[1, shard, "weight_scale_2"] = torch.tensor(1.0)
    load(layer, tensors)
    x, weights, _ = choices(3, *dims[:2])
    assert not layer(x, weights, torch.ones(3, 2, dtype=torch.int32)).any()


def test_dims_that_are_no_whole_blocks_say_what_would_do() -> None:
    with pytest.raises(ShapeError, match="size of 6 divides I=96"):
        Experts("reference", (2, 128, 12), tp_rank=0, tp_size=8)
    with pytest.raises(ShapeError, match="exclude it from quantization"):
        Experts("reference", (2, 72, 64))


@pytest.mark.parametrize("ids", [[[0, 2]], [[0, -2]], [[0.0, 1.0]]], ids=str)
def test_choices_that_are_no_experts_are_refused(ids: list[list[float]]) -> None:
    layer = Experts("reference", SHAPES[0])
    load(layer, stored(SHAPES[0]))
    x, weights, _ = choices(1, *SHAPES[0][:2])
    with pytest.raises(ShapeError, match=r"(?s)no choices of experts.*expert 0 to 1"):
        layer(x, weights, torch.tensor(ids).to(torch.int32) if isinstance(ids[0][0], int) else torch.tensor(ids))
    with pytest.raises(ShapeError, match="int64"):
        layer(x, weights.long(), torch.zeros(1, 2, dtype=torch.int64))
    one = layer(x, weights, torch.tensor([[0, -1]]))
    assert torch.equal(one, layer(x, weights * torch.tensor([1.0, 0.0]), torch.tensor([[0, 0]], dtype=torch.int32)))


@every_runner
def test_law_8_activations_that_are_none_are_refused(runner: str) -> None:
    """Whole numbers were computed with, and the sums cut to them."""
    layer = Experts(runner, SHAPES[0])
    load(layer, stored(SHAPES[0]))
    x, weights, ids = choices(2, *SHAPES[0][:2])
    for dtype in (torch.uint8, torch.int32, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(ShapeError, match=rf"{runner}: this runner does not take activations of this dtype(?s:.*){dtype}"):
            layer(x.to(dtype), weights, ids)
        with pytest.raises(ShapeError, match="this runner does not take activations"):
            layer.method.apply_logits(layer, x.to(dtype), x[:, : SHAPES[0][0]].float(), Routing("softmax_topk", 1))
    for few in (x[0, 0], x[:, :16]):
        with pytest.raises(ShapeError, match="the input does not fit"):
            layer(few, weights, ids)


def test_law_10_experts_that_are_created_a_second_time_leave_the_layer_as_it_was() -> None:
    layer = Experts("reference", SHAPES[0])
    load(layer, stored(SHAPES[0]))
    before, chosen = names(layer), choices(2, *SHAPES[0][:2])
    out = layer(*chosen)
    with pytest.raises(StateError, match="this layer has its weights already"):
        layer.method.create_weights(layer, 3, 64, 64, torch.bfloat16)
    assert names(layer) == before and torch.equal(layer(*chosen), out)


# -- twice within one load -------------------------------------------------------------------------------------------------


def test_a_shard_twice_is_the_last_one_by_loaders_and_refused_by_a_transaction() -> None:
    dims = SHAPES[0]
    a, b = stored(dims), stored(dims, 1)
    layer, oracle = Experts("flashinfer_cutlass", dims), Experts("flashinfer_cutlass", dims)
    load(layer, b, process=False)
    load(layer, a)
    load(oracle, a)
    assert names(layer) == names(oracle)
    whole = {n: t.clone() for n, t in checkpoint_state_dict(layer).items()}
    with pytest.raises(ReloadError, match=r"(?s)w13_weight: .*twice.*\[1:2"), reload(layer, scope="partial") as session:
        session.update("w13_weight", whole["w13_weight"][:1], first_row=0)
        session.update("w13_weight", whole["w13_weight"][1:], first_row=1)
        session.update("w13_weight", whole["w13_weight"][1:], first_row=1)
    with reload(layer) as session:
        session.load(whole)
    assert names(layer) == names(oracle)


def test_one_expert_twice_and_another_never_is_not_a_complete_load() -> None:
    layer, tensors = Experts("reference", SHAPES[0]), stored(SHAPES[0])
    twice = {key: tensors[(0, *key[1:])] for key in tensors if key[0] == 0}
    load(layer, twice, process=False)
    load(layer, twice, process=False)
    with pytest.raises(StateError, match="w13_weight"):
        process(layer)
