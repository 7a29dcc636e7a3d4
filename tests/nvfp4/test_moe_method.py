"""The MoE method's arguments: compressed-tensors, W4A16, fused and interleaved tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aliasparam import checkpoint_state_dict
from aliasparam_nvfp4 import COMPRESSED_TENSORS, MODELOPT, NvFp4MoEMethod
from aliasparam_nvfp4.errors import BackendError

from .moe_experts import ACTIVATIONS, RUNNERS, Dims, Experts, rows_of, serving, stored
from .moe_layers import SHAPES, Checkpoint, choices, dense, load, names

every_runner = pytest.mark.parametrize("runner", RUNNERS)
FORMATS = {"modelopt": MODELOPT, "compressed-tensors": COMPRESSED_TENSORS}
every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
KERNEL_BYTES = ("w13_weight_prepared", "w2_weight_prepared", "w13_blockscale_swizzled", "w2_blockscale_swizzled")


# -- compressed-tensors ------------------------------------------------------------------------------------------------


@every_runner
@pytest.mark.parametrize("dims", SHAPES, ids=str)
def test_compressed_tensors_experts_are_those_of_modelopt_by_reciprocals(runner: str, dims: Dims) -> None:
    ours, modelopt = Experts(runner, dims, checkpoint=COMPRESSED_TENSORS), Experts(runner, dims)
    load(ours, stored(dims, fmt=COMPRESSED_TENSORS))
    load(modelopt, stored(dims))
    assert {n for n, _ in ours.named_buffers()} == {n for n, _ in modelopt.named_buffers()}
    for name in KERNEL_BYTES:
        assert torch.equal(ours.get_buffer(name).view(torch.uint8), modelopt.get_buffer(name).view(torch.uint8))
    for name, value in ours.named_buffers():
        if value.dtype is torch.float32:
            torch.testing.assert_close(value, modelopt.get_buffer(name), rtol=1e-6, atol=0)


def test_compressed_tensors_takes_the_smallest_input_scale_exactly() -> None:
    dims = SHAPES[0]
    tensors, layer = stored(dims, fmt=COMPRESSED_TENSORS), Experts("reference", dims, checkpoint=COMPRESSED_TENSORS)
    load(layer, tensors)
    for name, shards in (("w13", ("w1", "w3")), ("w2", ("w2",))):
        smallest = min(float(t) for (_, s, f), t in tensors.items() if f == "input_global_scale" and s in shards)
        assert layer.get_buffer(f"{name}_input_scale_quant").tolist() == [smallest]


@every_format
@pytest.mark.parametrize("runner, kind", [(n, kind) for kind, a in ACTIVATIONS.items() for n in serving(a)])
def test_round_trip_the_export_is_bit_equal_to_what_was_loaded(runner: str, kind: str, fmt: Any) -> None:
    dims, activation = SHAPES[2], ACTIVATIONS[kind]
    layer = Experts(runner, dims, checkpoint=fmt, activation=activation)
    for seed in (0, 1, 0):
        tensors = stored(dims, seed, fmt=fmt, activation=activation)
        load(layer, tensors)
        exported = checkpoint_state_dict(layer)
        for (expert, shard, suffix), tensor in tensors.items():
            whole = exported[f"{'w2' if shard == 'w2' else 'w13'}_{suffix}"][expert]
            if shard != "w2" and activation.gated:
                whole = whole.chunk(2)[0 if shard == "w1" else 1]
            assert _bytes(whole) == _bytes(tensor), (expert, shard, suffix)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@every_format
@pytest.mark.parametrize("runner", serving(input_scale=False))
def test_checkpoints_without_activation_scales_serve_on_runners_that_need_none(runner: str, fmt: Any) -> None:
    dims = SHAPES[1]
    layer = Experts(runner, dims, checkpoint=fmt, input_scale=False)
    load(layer, tensors := stored(dims, fmt=fmt, input_scale=False))
    s1 = tensors[1, "w1", fmt.weight_global]
    assert layer.get_buffer("g1_alphas")[1] == (1.0 / s1 if fmt.reciprocal else s1)
    assert not [n for n, _ in layer.named_parameters() if fmt.input_global in n]


def test_runners_that_quantize_activations_refuse_such_checkpoints_at_construction() -> None:
    for runner in set(RUNNERS) - set(serving(input_scale=False)):
        with pytest.raises(BackendError, match=rf"(?s){runner}.*activation scales"):
            NvFp4MoEMethod(runner, input_scale=False)
    assert not NvFp4MoEMethod("auto", input_scale=False).backend.needs_input_scale


def test_the_reference_takes_activations_as_they_are_where_there_are_no_scales() -> None:
    dims = SHAPES[0]
    layer, exact = Experts("reference", dims, input_scale=False), Experts("reference", dims)
    load(layer, tensors := stored(dims, input_scale=False))
    load(exact, stored(dims))
    x, weights, ids = choices(4, *dims[:2])
    torch.testing.assert_close(layer(x, weights, ids).double(), dense(tensors, x, weights, ids), rtol=1e-4, atol=1e-4)
    assert not torch.equal(layer(x, weights, ids), exact(x, weights, ids))


# -- fused and interleaved checkpoint tensors ----------------------------------------------------------------------------


def fused(tensors: Checkpoint, expert: int, suffix: str, *, interleaved: bool) -> Tensor:
    rows = rows_of(tensors, expert, "w13", suffix)
    return rows.view(2, -1, rows.shape[-1]).transpose(0, 1).reshape(rows.shape) if interleaved else rows


def load_fused(layer: Experts, tensors: Checkpoint, *, interleaved: bool, stacked: bool) -> None:
    experts = sorted({e for e, _, _ in tensors})
    for suffix in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
        scalar = suffix in ("weight_scale_2", "input_scale")
        both = [
            torch.stack([tensors[e, "w1", suffix], tensors[e, "w3", suffix]])
            if scalar
            else fused(tensors, e, suffix, interleaved=interleaved)
            for e in experts
        ]
        for shard, found in (("w13", both), ("w2", [tensors[e, "w2", suffix] for e in experts])):
            param = layer.get_parameter(f"{shard}_{suffix}")
            if stacked:
                param.weight_loader(param, torch.stack(found), f"experts.{shard}.{suffix}", shard)  # type: ignore[operator]
            else:
                for e, tensor in zip(experts, found, strict=True):
                    param.weight_loader(param, tensor, f"experts.{e}.{shard}", shard, e)  # type: ignore[operator]
    layer.method.process_weights_after_loading(layer)


@every_runner
@pytest.mark.parametrize("stacked", [False, True], ids=["expert by expert", "stacked"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_a_fused_w13_loads_twice_to_the_bytes_of_its_projections(runner: str, interleaved: bool, stacked: bool) -> None:
    dims = SHAPES[1]
    layer, oracle = Experts(runner, dims, interleaved=interleaved), Experts(runner, dims)
    for seed in (0, 1):
        tensors = stored(dims, seed)
        load_fused(layer, tensors, interleaved=interleaved, stacked=stacked)
        load(oracle, tensors)
        assert names(layer) == names(oracle)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("parallel", [{"tp": 2}, {"ep": 2}], ids=str)
def test_a_fused_w13_is_divided_among_ranks_as_its_projections(interleaved: bool, parallel: dict[str, int]) -> None:
    e, h, i = 4, 128, 256
    tensors = stored((e, h, i))
    ((how, size),) = parallel.items()
    dims = (e // size, h, i) if how == "ep" else (e, h, i // size)
    for rank in range(size):
        ranks = {f"{how}_rank": rank, f"{how}_size": size}
        for stacked in (False, True):
            layer = Experts("flashinfer_cutlass", dims, interleaved=interleaved, **ranks)
            oracle = Experts("flashinfer_cutlass", dims, **ranks)
            load_fused(layer, tensors, interleaved=interleaved, stacked=stacked)
            load(oracle, tensors)
            assert names(layer) == names(oracle)


def test_scalars_come_as_0d_or_as_one_element_and_one_counts_for_both_halves() -> None:
    layer = Experts("reference", SHAPES[0])
    param = layer.get_parameter("w13_weight_scale_2")
    for value in (torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5]])):
        assert param.weight_loader(param, value, "s", "w13", 1)  # type: ignore[operator]
        assert param.weight_loader(param, value * 2, "s", "w3", 0)  # type: ignore[operator]
        assert param.weight_loader(param, value * 3, "s", "w1", 0, return_success=True)  # type: ignore[operator]
        assert param.tolist() == [[1.5, 1.0], [0.5, 0.5]]
