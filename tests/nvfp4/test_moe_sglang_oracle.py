"""Kernel bytes of MoE runners equal SGLang's own functions, run on the CPU. Skipped where sglang is not installed."""

from __future__ import annotations

import pytest
import torch

from .moe_layers import MoE, checkpoint, load

DIMS = [(2, 128, 128), (3, 256, 64), (1, 384, 192)]


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("runner", ["flashinfer_cutlass", "flashinfer_cutedsl"])
def test_bytes_are_those_of_sglang(runner: str, dims: tuple[int, int, int]) -> None:
    utils = pytest.importorskip("sglang.srt.layers.quantization.utils")
    cutedsl = pytest.importorskip("sglang.srt.layers.moe.moe_runner.flashinfer_cutedsl")
    tensors, layer = checkpoint(*dims), MoE(runner, *dims)
    load(layer, tensors)
    stacked = {
        (name, suffix): torch.stack([torch.cat([tensors[e, s, suffix] for s in shards]) for e in range(dims[0])])
        for name, shards in (("w13", ("w1", "w3")), ("w2", ("w2",)))
        for suffix in ("weight", "weight_scale")
    }
    weight, scale = utils.reorder_w1w3_to_w3w1(stacked["w13", "weight"], stacked["w13", "weight_scale"].view(torch.uint8))
    if runner == "flashinfer_cutedsl":
        weight, scale = (cutedsl.interleave_w13_halves(t, group_size=64, dim=1) for t in (weight, scale))
    assert torch.equal(layer.get_buffer("w13_weight_prepared"), weight)
    assert torch.equal(layer.get_buffer("w2_weight_prepared"), stacked["w2", "weight"])
    for name, linear in (("w13", scale.view(torch.float8_e4m3fn)), ("w2", stacked["w2", "weight_scale"])):
        expected = utils.swizzle_blockscale(linear)
        assert torch.equal(layer.get_buffer(f"{name}_blockscale_swizzled").view(torch.uint8), expected.view(torch.uint8))
