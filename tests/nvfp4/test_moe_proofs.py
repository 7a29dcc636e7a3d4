"""Proofs (a) and (b) of MoE runners: bytes are FlashInfer's own, and an emulator of the kernel gives the checkpoint's layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from aliasparam_nvfp4.linear.verify import signal_to_noise
from aliasparam_nvfp4.moe.activation import SWIGLU
from aliasparam_nvfp4.moe.emulate import layer_output, weights
from aliasparam_nvfp4.moe.runners import moe_runner, moe_runners
from aliasparam_nvfp4.moe.scales import InputScales
from aliasparam_nvfp4.quantize.codec import quantize_activation, scaled_codes

from .moe_layers import SHAPES, MoE, checkpoint, choices, dense, load, load_whole, stacked

RUNNERS = sorted(moe_runners())
every_runner = pytest.mark.parametrize("runner", RUNNERS)
every_shape = pytest.mark.parametrize("dims", SHAPES, ids=str)
#: (E, H, I): one, few, many experts; aligned, and padded in H, in I and in both.
DIMS = [(1, 128, 128), (8, 256, 256), (2, 384, 192), (3, 576, 192), (8, 64, 48), (128, 128, 64), (384, 80, 48), (384, 128, 256)]


# -- (a) bytes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("runner", [name for name in RUNNERS if name.startswith("flashinfer")])
def test_bytes_are_those_of_flashinfers_functions(runner: str, dims: tuple[int, int, int]) -> None:
    """Rows in the order its index functions give, scales swizzled by its own CPU swizzle."""
    core, prepare = pytest.importorskip("flashinfer.fused_moe.core"), pytest.importorskip("flashinfer.fused_moe.prepare")
    tensors, layer, chosen = checkpoint(*dims), MoE(runner, *dims), moe_runner(runner)
    load_whole(layer, tensors)
    h, i = layer.nvfp4_moe_shape.padded(chosen.layout)  # type: ignore[operator, union-attr]
    halves = ("w1", "w3") if chosen.layout.name in ("row-major", "gate-up") else ("w3", "w1")

    def ordered(rows: Tensor, shards: tuple[str, ...]) -> Tensor:
        if chosen.layout.name == "interleaved" and len(shards) == 2:
            return prepare._interleave_linear_and_gate(rows, 64, 1)  # type: ignore[no-any-return]
        if chosen.layout.name == "shuffled":
            order = core.get_w2_permute_indices_with_cache if len(shards) == 1 else core._maybe_get_cached_w3_w1_permute_indices
            return rows[:, order({}, rows[0], 128)]
        return rows

    for name, shards, (n, k) in (("w13", halves, (i, h)), ("w2", ("w2",), (h, i))):
        found = layer.get_buffer(f"{name}_weight_prepared")
        assert torch.equal(found, ordered(stacked(tensors, shards, "weight", n, k // 2), shards)), name
        scales = ordered(stacked(tensors, shards, "weight_scale", n, k // 16), shards)
        if chosen.layout.name != "row-major":
            scales = prepare._swizzle_cutile_fp4_scales(scales, scale_block_size=16)
        found = layer.get_buffer(f"{name}_blockscale_swizzled").view(torch.uint8)
        assert torch.equal(found.reshape(-1), scales.reshape(-1)), name


PREPARED = {
    "flashinfer_trtllm": ("gemm1_weights", "gemm1_weights_scale", "gemm2_weights", "gemm2_weights_scale"),
    "flashinfer_trtllm_routed": ("gemm1_weights", "gemm1_weights_scale", "gemm2_weights", "gemm2_weights_scale"),
    "flashinfer_cutedsl": ("w1_weight", "w1_weight_sf", "w2_weight", "w2_weight_sf"),
    "flashinfer_b12x": ("w1_weight", "w1_weight_sf", "w2_weight", "w2_weight_sf"),
}


@pytest.mark.parametrize("dims", [(1, 128, 128), (8, 256, 256), (3, 624, 192), (2, 80, 48), (128, 128, 64)], ids=str)
@pytest.mark.parametrize("runner", sorted(PREPARED))
def test_bytes_are_those_of_flashinfers_preparation(
    runner: str, dims: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its whole ``prepare_*`` from bfloat16 weights, with what needs a GPU in it (quantizer, swizzle) done on the CPU."""
    fi, prepare = pytest.importorskip("flashinfer.fused_moe"), pytest.importorskip("flashinfer.fused_moe.prepare")

    def swizzled(scale: Tensor) -> Tensor:
        return prepare._swizzle_cutile_fp4_scales(scale.view(torch.uint8).unsqueeze(0), scale_block_size=16).reshape(-1)  # type: ignore[no-any-return]

    def quantizer(x: Tensor, global_scale: Tensor, is_sf_swizzled_layout: bool, **_: Any) -> tuple[Tensor, Tensor]:
        codes, scale = quantize_activation(x, global_scale)
        return codes, swizzled(scale) if is_sf_swizzled_layout else scale.view(torch.uint8)

    monkeypatch.setattr("flashinfer.fp4_quantization.fp4_quantize", quantizer)
    monkeypatch.setattr("flashinfer.quantization.fp4_quantization.block_scale_interleave", swizzled)
    e, h, i = dims
    random = torch.Generator().manual_seed(0)
    shards = {s: torch.randn(e, *d, generator=random).bfloat16() for s, d in (("w1", (i, h)), ("w3", (i, h)), ("w2", (h, i)))}
    tensors = {}
    for shard, values in shards.items():
        codes, scale = quantize_activation(values, torch.ones(()))
        for expert in range(e):
            for suffix, tensor in (("weight", codes[expert]), ("weight_scale", scale[expert])):
                tensors[expert, shard, suffix] = tensor
            tensors |= {(expert, shard, suffix): torch.ones(()) for suffix in ("weight_scale_2", "input_scale")}
    layer = MoE(runner, *dims)
    load_whole(layer, tensors)
    hidden, intermediate = layer.nvfp4_moe_shape.padded(moe_runner(runner).layout)  # type: ignore[operator, union-attr]

    def padded(shard: str) -> Tensor:
        rows, columns = (hidden, intermediate) if shard == "w2" else (intermediate, hidden)
        values = shards[shard]
        return functional.pad(values, (0, columns - values.shape[2], 0, rows - values.shape[1]))

    sizes = {"num_local_experts": e, "hidden_size": hidden, "intermediate_size": intermediate}
    quant = {"quant": fi.QuantConfig(weight=fi.QuantFormat.NVFP4, activation=fi.QuantFormat.NVFP4)}
    prepared = {
        "flashinfer_cutedsl": prepare.prepare_cute_dsl_weights,
        "flashinfer_b12x": prepare.prepare_b12x_nvfp4_weights,
    }.get(runner, prepare.prepare_trtllm_fp4_weights)
    view = prepared(torch.cat([padded("w3"), padded("w1")], 1), padded("w2"), **sizes, **({} if "b12x" in runner else quant))
    mine = ("w13_weight_prepared", "w13_blockscale_swizzled", "w2_weight_prepared", "w2_blockscale_swizzled")
    for name, theirs in zip(mine, PREPARED[runner], strict=True):
        expected = view[theirs].view(torch.uint8) if view[theirs].dtype.itemsize == 1 else view[theirs]
        expected = expected.permute(5, 2, 4, 0, 1, 3) if expected.dim() == 6 else expected  # the MMA view back to memory order
        assert torch.equal(layer.get_buffer(name).view(torch.uint8).reshape(-1), expected.reshape(-1)), name


# -- (b) emulator --------------------------------------------------------------------------------------------------------------


@every_runner
@every_shape
def test_an_emulator_reads_the_checkpoint_from_kernel_bytes(runner: str, dims: tuple[int, int, int]) -> None:
    tensors, layer = checkpoint(*dims), MoE(runner, *dims)
    load(layer, tensors)
    for expert in range(dims[0]):
        w13, w2 = weights(layer, moe_runner(runner), layer.nvfp4_moe_shape, expert)  # type: ignore[arg-type]
        rows = [scaled_codes(tensors[expert, s, "weight"], tensors[expert, s, "weight_scale"]) for s in ("w1", "w3", "w2")]
        assert torch.equal(w13, torch.cat(rows[:2]).double())
        assert torch.equal(w2, rows[2].double())


@every_runner
@every_shape
@pytest.mark.parametrize("rank", [0, 1])
def test_the_emulated_kernel_computes_the_layer_from_bytes_and_scalars(
    runner: str, dims: tuple[int, int, int], rank: int
) -> None:
    """Every scalar where the kernel's documentation puts it: a wrong direction, factor or expert is off by decibels."""
    chosen, (e, h, i) = moe_runner(runner), dims
    tensors = checkpoint(2 * e, h, i, untied=chosen.separate_scales)
    layer = MoE(runner, e, h, i, ep_rank=rank, ep_size=2)
    load(layer, tensors)
    x, topk_weights, ids = choices(5, 2 * e, h)
    found = layer_output(layer, chosen, layer.nvfp4_moe_shape, x, topk_weights, ids)  # type: ignore[arg-type]
    own = torch.where(ids // e == rank, topk_weights, 0.0)
    inputs = {InputScales.NONE: "as they are", InputScales.EACH: "each"}.get(chosen.input_scales, "all")
    assert signal_to_noise(found, dense(tensors, x, own, ids, inputs=inputs)) > 55
    if inputs != "as they are":  # the bar can be missed: other scales are other results
        other = "all" if inputs == "each" else "each"
        assert signal_to_noise(found, dense(tensors, x, own, ids, inputs=other)) < 45


@every_shape
def test_the_reference_is_its_emulator_and_the_layer_within_quantization_noise(dims: tuple[int, int, int]) -> None:
    tensors, layer = checkpoint(*dims, untied=True), MoE("reference", *dims)
    load(layer, tensors)
    x, topk_weights, ids = choices(4, *dims[:2])
    found = layer(x, topk_weights, ids).double()
    emulated = layer_output(layer, moe_runner("reference"), layer.nvfp4_moe_shape, x, topk_weights, ids)  # type: ignore[arg-type]
    assert signal_to_noise(found, emulated) > 55
    assert signal_to_noise(found, dense(tensors, x, topk_weights, ids)) > 12
    assert layer.nvfp4_moe_shape.expert_activation == SWIGLU  # type: ignore[union-attr]
