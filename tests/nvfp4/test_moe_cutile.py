"""cuTile: its weight views are FlashInfer's preparation without a copy, and its own runner accepts them up to the launch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from aliasparam_nvfp4.linear.verify import signal_to_noise
from aliasparam_nvfp4.moe.runners import MoEShape, _cutile, moe_runner
from aliasparam_nvfp4.moe.runners._base import own_choices
from aliasparam_nvfp4.moe.runners._cutile import CuTile
from aliasparam_nvfp4.quantize.codec import scaled_codes

from .moe_layers import SHAPES, MoE, checkpoint, choices, dense, load, load_whole, stacked

DIMS = [(1, 128, 128), (8, 256, 64), (2, 384, 192), (128, 64, 64), (384, 80, 48)]
RUNNERS = ["flashinfer_cutile", "flashinfer_cutile_sm12x"]
both = pytest.mark.parametrize("runner", RUNNERS)


def views(runner: str, layer: Any) -> dict[str, Tensor]:
    chosen = moe_runner(runner)
    assert isinstance(chosen, CuTile)
    return chosen.weight_views(layer, layer.nvfp4_moe_shape)


def prepared(runner: str, dims: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """FlashInfer's preparation of the same checkpoint, padded with zeros to the 64s it wants."""
    module = pytest.importorskip("flashinfer.fused_moe.prepare")
    if runner == "flashinfer_cutile":  # as it does below compute capability 10, which it asks of CUDA devices alone
        monkeypatch.setattr(module, "_swizzle_cutile_fp4_scales", lambda scale, scale_block_size: scale.contiguous())
    e, h, i = dims
    hidden, intermediate = -(-h // 64) * 64, -(-i // 64) * 64
    tensors = checkpoint(*dims, untied=True)

    def scale_2(shards: tuple[str, ...]) -> Tensor:
        return torch.tensor([[float(tensors[x, s, "weight_scale_2"]) for s in shards] for x in range(e)])

    up_gate = ("w3", "w1")
    found: dict[str, Tensor] = module.prepare_cutile_nvfp4_weights(
        stacked(tensors, up_gate, "weight", intermediate, hidden // 2),
        stacked(tensors, up_gate, "weight_scale", intermediate, hidden // 16).view(torch.float8_e4m3fn),
        scale_2(up_gate),
        stacked(tensors, ("w2",), "weight", hidden, intermediate // 2),
        stacked(tensors, ("w2",), "weight_scale", hidden, intermediate // 16).view(torch.float8_e4m3fn),
        scale_2(("w2",))[:, 0],
        num_local_experts=e,
        hidden_size=hidden,
        intermediate_size=intermediate,
    )
    return found


@both
@pytest.mark.parametrize("dims", [*DIMS, *SHAPES], ids=str)
def test_weight_views_are_flashinfers_preparation_without_a_copy(
    runner: str, dims: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = MoE(runner, *dims)
    load_whole(layer, checkpoint(*dims, untied=True))
    found, expected = views(runner, layer), prepared(runner, dims, monkeypatch)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        assert found[name].is_contiguous() and torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    names = (
        "w13_weight_prepared",
        "w13_blockscale_swizzled",
        "g1_alphas_gate_up",
        "w2_weight_prepared",
        "w2_blockscale_swizzled",
    )
    for view, name in zip(found.values(), (*names, "g2_alphas"), strict=True):
        assert view.data_ptr() == layer.get_buffer(name).data_ptr(), name
    before = {name: view.data_ptr() for name, view in found.items()}
    load_whole(layer, checkpoint(*dims, seed=1))
    assert {name: view.data_ptr() for name, view in views(runner, layer).items()} == before


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """FlashInfer's real cuTile runner with its checks, on the CPU; what it would launch is kept."""
    fi, runners = pytest.importorskip("flashinfer.fused_moe"), pytest.importorskip("flashinfer.fused_moe.runners")
    seen: list[tuple[Any, ...]] = []
    kept = SimpleNamespace(arch=90, launches=seen, layers=0, resets=0, tuner=SimpleNamespace(is_tuning_mode=False))

    def run_moe(*args: Any, **kwargs: Any) -> Tensor:
        seen.append((args, kwargs))
        return computed(*args[:10])

    class Layer:
        def __init__(self, config: Any, device: torch.device) -> None:
            kept.layers += 1
            (candidate,) = config.backend.candidates
            assert candidate.supported(kept.arch)
            self.tuner = kept.tuner
            self.config = config
            self.runner = runner = object.__new__(runners.CuTileNvfp4Bf16Runner)
            assert runner.supports_quant(config.quant)
            runner.__dict__.update(
                config=config, device=device, _device_arch=kept.arch, _num_sms=1, _built=True, _workspace_cache={}
            )
            runner._kernel_module = SimpleNamespace(
                run_moe=run_moe, allocate_workspace=lambda **_: SimpleNamespace(), GemmConfig=lambda *numbers: numbers
            )
            runners.MoERunner._check_support(runner)

        def reset_winner(self) -> None:
            kept.resets += 1

        def __call__(self, act: Any, pack: Any) -> Tensor:
            assert act.num_tokens <= self.config.execution.tune_max_num_tokens
            assert act.routing_input_mode in self.runner.supported_routing_modes and self.runner.accepts(act, pack)
            return self.runner.forward(self.runner.pack_inputs(act, pack))  # type: ignore[no-any-return]

    monkeypatch.setattr(fi, "MoELayer", Layer)
    _cutile._layer.cache_clear()
    yield kept
    _cutile._layer.cache_clear()


def computed(x: Tensor, ids: Tensor, topk: Tensor, w1: Tensor, s1: Tensor, g1: Tensor, w2: Tensor, s2: Tensor, g2: Tensor,
             out: Tensor) -> Tensor:  # fmt: skip
    """``run_moe`` as ``cutile/fp4.py`` documents it: bf16 after each GEMM and the activation, scales row-major or in tiles."""

    def values(weight: Tensor, scales: Tensor, expert: int) -> Tensor:
        rows, columns = weight.shape[1], weight.shape[2] // 8
        own = scales[expert].view(torch.uint8)
        if own.dim() == 4:  # [R/128, C/4, 32, 16], byte 4 * (row // 32) + column of a tile's 16
            r, c = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            own = own[r // 128, c // 4, r % 32, 4 * (r % 128 // 32) + c % 4]
        return scaled_codes(weight[expert], own.view(torch.float8_e4m3fn))

    out.zero_()
    for expert in range(w1.shape[0]):
        token, choice = (ids == expert).nonzero(as_tuple=True)
        factor = g1[expert].repeat_interleave(w1.shape[1] // 2)  # global_scale_shards: one for each half of the rows
        gate, up = ((x[token].float() @ values(w1, s1, expert).T) * factor).bfloat16().float().chunk(2, -1)
        hidden = (functional.silu(gate) * up).bfloat16().float()
        rows = ((hidden @ values(w2, s2, expert).T) * g2[expert]).bfloat16().float()
        out.index_add_(0, token, (rows * topk[token, choice].unsqueeze(-1)).to(out.dtype))
    return out


@both
@pytest.mark.parametrize("dims", SHAPES, ids=str)
def test_flashinfers_runner_takes_the_call_and_its_formula_gives_the_layer(
    runner: str, dims: tuple[int, int, int], launched: Any
) -> None:
    launched.arch = 90 if runner == "flashinfer_cutile" else 120
    layer = MoE(runner, *dims)
    tensors = checkpoint(*dims, untied=True)
    load(layer, tensors)
    for tokens in (3, 3, 5):
        x, weights, ids = choices(tokens, *dims[:2])
        out = moe_runner(runner).apply(layer, x.bfloat16(), weights, ids, layer.nvfp4_moe_shape)  # type: ignore[arg-type]
        assert out.shape == (tokens, dims[1]) and out.dtype is torch.bfloat16
        assert signal_to_noise(out.double(), dense(tensors, x.bfloat16().float(), weights, ids)) > 40
    assert launched.layers == 1, "one MoELayer for a shape"
    args, kwargs = launched.launches[0]
    assert all(
        given is view or given.data_ptr() == view.data_ptr()
        for given, view in zip(args[3:9], views(runner, layer).values(), strict=True)
    )
    assert not kwargs["activation_fp4"] and kwargs["scale_block_size"] == 16
    assert (kwargs["activation"].alpha, kwargs["activation"].beta) == (1.0, 0.0)


def test_more_tokens_than_flashinfers_ceiling_and_its_tuning_are_served(launched: Any) -> None:
    layer = MoE("flashinfer_cutile", 2, 64, 64)
    load(layer, checkpoint(2, 64, 64))
    x, weights, ids = choices(3, 2, 64)
    many = 8195
    for tokens in (3, many):
        rows, w, i = (t.repeat(-(-tokens // 3), 1)[:tokens] for t in (x, weights, ids))
        out = moe_runner("flashinfer_cutile").apply(layer, rows, w, i, layer.nvfp4_moe_shape)  # type: ignore[arg-type]
        assert out.shape == (tokens, 64) and out.dtype is torch.float32
    assert launched.layers == 2 and launched.resets == 0
    launched.tuner.is_tuning_mode = True  # within flashinfer.autotune()
    moe_runner("flashinfer_cutile").apply(layer, x, weights, ids, layer.nvfp4_moe_shape)  # type: ignore[arg-type]
    assert launched.layers == 2 and launched.resets == 1


def test_expert_parallel_choices_stay_within_the_rank() -> None:
    ids, weights = torch.tensor([[0, 5], [7, 4]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    parts = [own_choices(ids, weights, MoEShape(4, 64, 64, 4 * r, 8, r, 2)) for r in range(2)]
    assert [p[0].tolist() for p in parts] == [[[0, 1], [3, 0]]] * 2
    assert parts[0][1].tolist() == [[0.25, 0.0], [0.0, 0.0]] and parts[1][1].tolist() == [[0.0, 0.75], [0.5, 0.5]]
    assert all(p[0].dtype is torch.int32 and p[1].dtype is torch.float32 for p in parts)
