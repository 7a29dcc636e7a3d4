"""Kernel bytes and scalars of MoE runners equal SGLang 0.5.23's own, run on the CPU: its functions, and its real method class."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn

from tests.nvfp4.moe_layers import SUFFIXES, Checkpoint, MoE, checkpoint, load, stacked

from .peers import nvfp4_config

DIMS = [(2, 128, 128), (3, 256, 64), (1, 384, 192)]
every_dims = pytest.mark.parametrize("dims", DIMS, ids=str)
MINE = ("w13_weight_prepared", "w2_weight_prepared", "w13_blockscale_swizzled", "w2_blockscale_swizzled")


def loaded(runner: str, dims: tuple[int, int, int], tensors: Checkpoint) -> MoE:
    layer = MoE(runner, *dims)
    load(layer, tensors)
    return layer


def checkpoint_rows(tensors: Checkpoint, dims: tuple[int, int, int], up_first: bool) -> dict[str, Tensor]:
    """What SGLang's loader has filled: w13 in the order that its runner wants, everything else as the checkpoint has it."""
    e, h, i = dims
    halves = ("w3", "w1") if up_first else ("w1", "w3")
    found: dict[str, Tensor] = {}
    for name, shards, (n, k) in (("w13", halves, (i, h)), ("w2", ("w2",), (h, i))):
        found[f"{name}_weight"] = stacked(tensors, shards, "weight", n, k // 2)
        found[f"{name}_weight_scale"] = stacked(tensors, shards, "weight_scale", n, k // 16).view(torch.float8_e4m3fn)
    for suffix in SUFFIXES[2:]:
        w13 = [[float(tensors[x, s, suffix]) for s in ("w1", "w3")] for x in range(e)]
        found |= {
            f"w13_{suffix}": torch.tensor(w13),
            f"w2_{suffix}": torch.tensor([float(tensors[x, "w2", suffix]) for x in range(e)]),
        }
    return found


@pytest.fixture
def swizzle(monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's swizzle in place of FlashInfer's kernel, which needs a GPU."""
    utils = pytest.importorskip("sglang.srt.layers.quantization.utils")

    def interleaved(scale: Tensor) -> Tensor:
        return utils.swizzle_blockscale(scale.view(torch.float8_e4m3fn).unsqueeze(0)).view(torch.uint8).reshape(-1)  # type: ignore[no-any-return]

    monkeypatch.setattr("flashinfer.nvfp4_block_scale_interleave", interleaved)
    return utils


@every_dims
@pytest.mark.parametrize("runner", ["flashinfer_cutlass", "flashinfer_cutedsl", "flashinfer_cutedsl_masked"])
def test_bytes_are_those_of_sglangs_functions(runner: str, dims: tuple[int, int, int], swizzle: Any) -> None:
    cutedsl = pytest.importorskip("sglang.srt.layers.moe.moe_runner.flashinfer_cutedsl")
    tensors = checkpoint(*dims)
    rows, layer = checkpoint_rows(tensors, dims, up_first=False), loaded(runner, dims, tensors)
    weight, scale = rows["w13_weight"], rows["w13_weight_scale"].view(torch.uint8)
    if runner != "flashinfer_cutedsl_masked":
        weight, scale = swizzle.reorder_w1w3_to_w3w1(weight, scale)
    if runner == "flashinfer_cutedsl":
        weight, scale = (cutedsl.interleave_w13_halves(t, group_size=64, dim=1) for t in (weight, scale))
    scales = (swizzle.swizzle_blockscale(t) for t in (scale.view(torch.float8_e4m3fn), rows["w2_weight_scale"]))
    for name, expected in zip(MINE, (weight, rows["w2_weight"], *scales), strict=True):
        assert torch.equal(layer.get_buffer(name).view(torch.uint8), expected.view(torch.uint8)), name


@every_dims
@pytest.mark.parametrize("runner", ["flashinfer_trtllm", "flashinfer_trtllm_routed"])
def test_bytes_are_those_of_sglangs_trtllm_preparation(runner: str, dims: tuple[int, int, int], swizzle: Any) -> None:
    e, h, i = dims
    tensors = checkpoint(*dims)
    rows, layer = checkpoint_rows(tensors, dims, up_first=True), loaded(runner, dims, tensors)
    names = ("w13_weight", "w2_weight", "w13_weight_scale", "w2_weight_scale")
    w13, s13, w2, s2 = swizzle.prepare_static_weights_for_trtllm_fp4_moe(*(rows[n] for n in names), h, i, e)
    for name, expected in zip(MINE, (w13, w2, s13, s2), strict=True):
        assert torch.equal(layer.get_buffer(name).view(torch.uint8), expected.view(torch.uint8)), name


@pytest.fixture
def cutlass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is missing, what ``flashinfer.cute_dsl.utils`` imports of it: SGLang calls a function there that is all torch."""
    if importlib.util.find_spec("cutlass") is None:
        for name in ("", "._mlir", "._mlir.dialects", "._mlir.dialects.cute", ".cute", ".cute.typing", ".cutlass_dsl"):
            monkeypatch.setitem(sys.modules, f"cutlass{name}", MagicMock())


class Only:
    """An enum's object of SGLang: of its ``is_x()`` questions, these are answered with yes."""

    def __init__(self, *yes: str) -> None:
        self.yes = yes

    def __getattr__(self, name: str) -> Any:
        return lambda: name.removeprefix("is_") in self.yes


#: Runner to (SGLang's runner backend, its all-to-all backend, whether its loader puts up rows first).
THEIRS = {
    "flashinfer_trtllm": ("flashinfer_trtllm", "none", True),
    "flashinfer_trtllm_routed": ("flashinfer_trtllm_routed", "none", True),
    "flashinfer_cutlass": ("flashinfer_cutlass", "none", True),
    "flashinfer_cutedsl": ("flashinfer_cutedsl", "none", True),
    "flashinfer_cutedsl_masked": ("flashinfer_cutedsl", "deepep", False),
}


def peer_layer(runner: str, dims: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A layer of SGLang's real ``ModelOptNvFp4FusedMoEMethod``, filled by nobody yet."""
    module = importlib.import_module("sglang.srt.layers.quantization.modelopt_quant")
    moe, utils = importlib.import_module("sglang.srt.layers.moe"), importlib.import_module("sglang.srt.layers.moe.utils")
    backend, all_to_all, up_first = THEIRS[runner]
    for owner in (module, moe, utils):
        monkeypatch.setattr(owner, "get_moe_runner_backend", lambda: Only(backend), raising=False)
        monkeypatch.setattr(owner, "get_moe_a2a_backend", lambda: Only(all_to_all), raising=False)
        monkeypatch.setattr(owner, "should_use_flashinfer_cutlass_moe_fp4_allgather", lambda: False, raising=False)
    monkeypatch.setattr(module, "get_platform", lambda: SimpleNamespace(is_blackwell=True))
    config = nvfp4_config(module)
    e, h, i = dims
    layer, method = nn.Module(), module.ModelOptNvFp4FusedMoEMethod(config)
    layer.moe_runner_config = SimpleNamespace(  # type: ignore[assignment]
        is_gated=True, activation="silu", gemm1_clamp_limit=None, swiglu_limit=None, gemm1_alpha=None
    )
    layer.dispatcher = MagicMock()
    layer.num_experts = layer.num_local_experts = e  # type: ignore[assignment]
    layer.moe_ep_rank, layer.moe_ep_size = 0, 1  # type: ignore[assignment]
    layer._cutedsl_wrapper = None  # type: ignore[assignment]
    layer.method = method
    monkeypatch.setattr(
        "sglang.srt.layers.moe.moe_runner.flashinfer_cutlass.materialize_swiglu_params_for_cutlass", lambda *_: None
    )
    method.moe_runner_config = layer.moe_runner_config
    method.create_weights(layer, e, h, i, torch.bfloat16, weight_loader=lambda *_: None)
    assert method.load_up_proj_weight_first is up_first
    return layer


def fill(layer: Any, rows: dict[str, Tensor]) -> None:
    for name, tensor in rows.items():
        getattr(layer, name).data.copy_(tensor)


@every_dims
@pytest.mark.parametrize("runner", sorted(THEIRS))
def test_bytes_and_scalars_are_those_of_sglangs_class(
    runner: str, dims: tuple[int, int, int], swizzle: Any, cutlass: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    untied = "trtllm" in runner
    tensors = checkpoint(*dims, untied=untied)
    if "cutedsl" in runner:  # its two paths mix scales of each expert with the largest of all; these are equal where both are
        tensors = {key: torch.tensor(0.004) if key[2] == "input_scale" else tensor for key, tensor in tensors.items()}
    rows = checkpoint_rows(tensors, dims, THEIRS[runner][2])
    theirs, layer = peer_layer(runner, dims, monkeypatch), loaded(runner, dims, tensors)
    fill(theirs, rows)
    theirs.method.process_weights_after_loading(theirs)
    swizzled = "weight_scale" if untied else "blockscale_swizzled"
    for name, expected in zip(MINE, ("w13_weight", "w2_weight", f"w13_{swizzled}", f"w2_{swizzled}"), strict=True):
        found = layer.get_buffer(name).view(torch.uint8)
        assert torch.equal(found.reshape(-1), getattr(theirs, expected).data.view(torch.uint8).reshape(-1)), name
    scalars = ["g1_alphas", "g2_alphas", "w13_input_scale_quant", "w2_input_scale_quant", *(["g1_scale_c"] if untied else [])]
    for name in scalars:
        found, expected = torch.broadcast_tensors(layer.get_buffer(name), getattr(theirs, name).data)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_processing_twice_is_wrong_there_and_right_here(swizzle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, dims = "flashinfer_trtllm_routed", DIMS[0]
    tensors = checkpoint(*dims)
    theirs, layer = peer_layer(runner, dims, monkeypatch), loaded(runner, dims, tensors)
    fill(theirs, checkpoint_rows(tensors, dims, up_first=True))
    theirs.method.process_weights_after_loading(theirs)
    first = theirs.w13_weight.data.clone()
    theirs.method.process_weights_after_loading(theirs)
    assert not torch.equal(theirs.w13_weight.data, first), "shuffled twice"
    layer.method.process_weights_after_loading(layer)
    assert torch.equal(layer.get_buffer("w13_weight_prepared"), first)
