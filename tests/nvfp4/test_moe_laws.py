"""The laws of MoE layers, on every runner."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from aliasparam import memory_report
from aliasparam.errors import AliasError, StaleKernelError, StateError
from aliasparam_nvfp4 import NvFp4MoEMethod
from aliasparam_nvfp4.demo.large_models import MODELS, MoEModel
from aliasparam_nvfp4.errors import BackendError, ScaleError, ShapeError
from aliasparam_nvfp4.moe.runners import moe_runner, moe_runners
from aliasparam_nvfp4.moe.scales import InputScales

from .moe_layers import SHAPES, MoE, checkpoint, choices, load, names

RUNNERS = sorted(moe_runners())
every_runner = pytest.mark.parametrize("runner", RUNNERS)
every_shape = pytest.mark.parametrize("dims", SHAPES, ids=str)


def loaded(runner: str, dims: tuple[int, int, int], seed: int = 0, **how: Any) -> MoE:
    layer = MoE(runner, *dims)
    load(layer, checkpoint(*dims, seed, **how))
    return layer


@every_runner
@every_shape
def test_idempotence_and_pointer_stability_and_warm_equals_cold(runner: str, dims: tuple[int, int, int]) -> None:
    layer = loaded(runner, dims)
    every = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    first, addresses = names(layer), {n: t.data_ptr() for n, t in every.items()}
    layer.method.process_weights_after_loading(layer)
    assert names(layer) == first
    load(layer, checkpoint(*dims, seed=1))
    assert names(layer) == names(loaded(runner, dims, seed=1))
    load(layer, checkpoint(*dims))
    assert names(layer) == first
    every = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    assert {n: t.data_ptr() for n, t in every.items()} == addresses


@every_runner
@pytest.mark.parametrize("part", ["one expert", "one shard", "scales", "weights"])
def test_selective_equals_full(runner: str, part: str) -> None:
    dims = SHAPES[1]
    a, b = checkpoint(*dims), checkpoint(*dims, seed=1)
    chosen = {
        "one expert": lambda key: key[0] == 1,
        "one shard": lambda key: key[1] == "w2",
        "scales": lambda key: key[2] == "weight_scale",
        "weights": lambda key: key[2] == "weight",
    }[part]
    layer, oracle = MoE(runner, *dims), MoE(runner, *dims)
    load(layer, a)
    load(layer, {key: tensor for key, tensor in b.items() if chosen(key)})
    load(oracle, {key: b[key] if chosen(key) else tensor for key, tensor in a.items()})
    assert names(layer) == names(oracle)


@every_runner
def test_one_copy(runner: str) -> None:
    report = memory_report(loaded(runner, SHAPES[0]))
    assert not report.fallbacks
    reads_the_checkpoint = moe_runner(runner).layout.name in ("checkpoint", "row-major")  # there is nothing to save
    assert report.saved_bytes > 0 or reads_the_checkpoint


@every_runner
def test_no_silent_garbage_a_stale_layer_refuses(runner: str) -> None:
    layer = loaded(runner, SHAPES[0])
    load(layer, {(0, "w1", "weight"): checkpoint(*SHAPES[0], seed=1)[0, "w1", "weight"]}, process=False)
    with pytest.raises(StaleKernelError):
        layer(*choices(2, *SHAPES[0][:2]))


@every_runner
def test_a_missing_expert_is_refused_by_name(runner: str) -> None:
    layer, tensors = MoE(runner, *SHAPES[0]), checkpoint(*SHAPES[0])
    with pytest.raises(StateError, match="w13"):
        load(layer, {key: tensor for key, tensor in tensors.items() if key[:2] != (1, "w3")})
    load(layer, {key: tensor for key, tensor in tensors.items() if key[:2] == (1, "w3")})
    assert names(layer) == names(loaded(runner, SHAPES[0]))


@every_runner
def test_untied_scales_are_right_or_refused_by_name(runner: str) -> None:
    tensors, layer = checkpoint(*SHAPES[0], untied=True), MoE(runner, *SHAPES[0])
    if not moe_runner(runner).separate_scales:
        with pytest.raises(ScaleError, match=rf"(?s){runner}.*expert 0"):
            load(layer, tensors)
        return
    load(layer, tensors)
    a1, a2 = (max(float(t) for (_, s, f), t in tensors.items() if f == "input_scale" and s in of) for of in ("w1 w3", "w2"))
    for expert in range(SHAPES[0][0]):
        s1, s3, s2 = (float(tensors[expert, s, "weight_scale_2"]) for s in ("w1", "w3", "w2"))
        as_they_are = moe_runner(runner).input_scales is InputScales.NONE
        expected = (s1, s3, s2) if as_they_are else (a1 * s1, a1 * s3 / a2, a2 * s2)
        found = (layer.g1_alphas[expert], layer.g1_scale_c[expert], layer.g2_alphas[expert])  # type: ignore[index]
        assert all(math.isclose(float(f), e, rel_tol=1e-6) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("size", [2, 4])
def test_expert_parallel_ranks_agree_on_input_scales_and_add_up(size: int) -> None:
    e, h, i = 4, 128, 64
    tensors, (x, weights, ids) = checkpoint(e, h, i), choices(6, e, h)
    whole = MoE("reference", e, h, i)
    load(whole, tensors)
    ranks = [MoE("reference", e // size, h, i, ep_rank=r, ep_size=size) for r in range(size)]
    for rank in ranks:
        load(rank, tensors)
        assert torch.equal(rank.get_buffer("w13_input_scale_quant"), whole.get_buffer("w13_input_scale_quant"))
    torch.testing.assert_close(sum(rank(x, weights, ids) for rank in ranks), whole(x, weights, ids))


@every_runner
@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_shards_are_the_bytes_of_slicing_first(runner: str, size: int) -> None:
    e, h, i = 2, 128, 256
    tensors = checkpoint(e, h, i)
    for rank in range(size):
        layer, oracle = MoE(runner, e, h, i // size, tp_rank=rank, tp_size=size), MoE(runner, e, h, i // size)
        load(layer, tensors)
        sliced = {
            key: t.chunk(size, 1 if key[1] == "w2" else 0)[rank].contiguous() if t.dim() == 2 else t for key, t in tensors.items()
        }
        load(oracle, sliced)
        assert names(layer) == names(oracle)


@every_runner
def test_bad_input_is_refused_and_changes_nothing(runner: str) -> None:
    dims = SHAPES[0]
    layer = loaded(runner, dims)
    before, param = names(layer), layer.get_parameter("w13_weight")
    good = checkpoint(*dims)[0, "w1", "weight"]
    for tensor, shard, expert in (
        (good, "w1", 2),
        (good, "w1", -1),
        (good, "w4", 0),
        (good[:-1], "w1", 0),
        (good.int(), "w3", 0),
    ):
        with pytest.raises(ShapeError):
            param.weight_loader(param, tensor, "experts", shard, expert)
    x, weights, ids = choices(2, *dims[:2])
    for bad in ((x[:, :-1], weights, ids), (x, weights[:1], ids), (x[:1], weights, ids)):
        with pytest.raises(ShapeError):
            layer(*bad)
    assert names(layer) == before
    for e, h, i in ((0, 64, 64), (1, 72, 64), (1, 64, 8)):
        with pytest.raises(ShapeError):
            MoE(runner, e, h, i)
    with pytest.raises(BackendError, match="flashinfer_cutlass"):
        NvFp4MoEMethod("nonsense")
    with pytest.raises(AliasError):
        NvFp4MoEMethod(runner, ep_rank=2, ep_size=2)


# -- memory ----------------------------------------------------------------------------------------------------------------


SWIZZLING = ["trtllm", "trtllm_routed", "cutlass", "cutedsl", "cutedsl_masked", "cutile_sm12x"]


@pytest.mark.parametrize("runner", [f"flashinfer_{name}" for name in SWIZZLING])
@pytest.mark.parametrize("model, saved", list(zip(MODELS, (14.77, 4.76, 3.30, 0.42), strict=True)), ids=str)
def test_memory_block_scales_are_kept_once(runner: str, model: MoEModel, saved: float) -> None:
    with torch.device("meta"):
        layer = MoE(runner, model.experts, model.hidden, model.intermediate_per_rank)
    rows = memory_report(layer).rows
    pairs = [row for row in rows if row.source in ("w13_weight_scale", "w2_weight_scale")]
    assert all(row.aliased for row in rows if row.derived and row.source.endswith(("weight", "weight_scale")))
    total = sum(row.two_copies_bytes - row.allocated_bytes for row in pairs) * model.layers
    assert round(total / 2**30, 2) == saved
