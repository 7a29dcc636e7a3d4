"""Projections that share one kernel call never answer with an output of other weights or of another input."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from aliasparam import process
from aliasparam.errors import StaleKernelError

transformers = pytest.importorskip("transformers")
from aliasparam_nvfp4 import retarget  # noqa: E402
from aliasparam_nvfp4.integrations.transformers import reload_folder  # noqa: E402

from .test_transformers import load, write_checkpoint  # noqa: E402


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return write_checkpoint(tmp_path / "a", 1), write_checkpoint(tmp_path / "b", 2)


def attention(model: Any) -> tuple[Any, Any, Any]:
    block = model.model.layers[0].self_attn
    return block.q_proj, block.k_proj, block.v_proj


def some_input() -> Tensor:
    return torch.randn(1, 3, 48, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_one_kernel_call_serves_all_projections_of_an_input(two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(two[0])
    fused, calls = model.model.layers[0].self_attn.qkv_proj, []
    apply = type(fused.nvfp4_backend).apply
    monkeypatch.setattr(type(fused.nvfp4_backend), "apply", lambda *a: calls.append(1) or apply(*a))
    x = some_input()

    parts = [projection(x) for projection in attention(model)]

    assert len(calls) == 1
    assert fused._pending is None, "all were handed out"
    assert torch.equal(torch.cat(parts, -1), fused(x))


@pytest.mark.parametrize("later", [0, 1], ids=["the same projection", "another projection"])
def test_law_9_no_output_outlives_the_weights(two: tuple[Path, Path], later: int) -> None:
    model, cold = load(two[0]), load(two[1])
    x = some_input()
    attention(model)[0](x)

    reload_folder(model, two[1])

    assert torch.equal(attention(model)[later](x), attention(cold)[later](x.clone()))


@pytest.mark.parametrize("later", [0, 1], ids=["the same projection", "another projection"])
def test_law_8_an_output_that_is_kept_does_not_bypass_the_refusal(two: tuple[Path, Path], later: int) -> None:
    model, cold = load(two[0]), load(two[1])
    x = some_input()
    attention(model)[0](x)

    model.load_state_dict(load_file(two[1] / "model.safetensors"), strict=False)

    with pytest.raises(StaleKernelError):
        attention(model)[later](x)
    process(model)
    assert torch.equal(attention(model)[later](x), attention(cold)[later](x.clone()))


def test_a_single_written_scale_is_seen_too(two: tuple[Path, Path]) -> None:
    model = load(two[0])
    q, k, _ = attention(model)
    x = some_input()
    q(x)
    for projection in attention(model):
        projection.input_scale.mul_(1.7)
    process(model)

    assert torch.equal(k(x), k(x.clone()))


def test_a_written_input_is_another_input(two: tuple[Path, Path]) -> None:
    q, k, _ = attention(load(two[0]))
    x = some_input()
    old = q(x)

    x.mul_(2)
    assert torch.equal(k(x), k(x.clone()))
    x.data.mul_(2)
    assert torch.equal(q(x), q(x.clone())) and not torch.equal(q(x), old)
    x.data = torch.ones_like(x)
    assert torch.equal(k(x), k(x.clone()))


def test_another_backend_is_another_question(two: tuple[Path, Path]) -> None:
    model = load(two[0])
    q, k, _ = attention(model)
    x = some_input()
    q(x)
    retarget(model, "flashinfer_cutlass")  # the same format: nothing moves

    with pytest.raises(Exception, match="cannot run here"):
        k(x)


def test_neither_the_input_nor_its_outputs_are_kept_alive(two: tuple[Path, Path]) -> None:
    model = load(two[0])
    fused = model.model.layers[0].self_attn.qkv_proj
    x = some_input()
    attention(model)[0](x)
    seen = weakref.ref(x)

    del x
    gc.collect()

    assert seen() is None
    assert fused._pending is None or fused._pending.is_empty


def test_a_model_with_an_open_question_copies_and_saves(two: tuple[Path, Path]) -> None:
    model = load(two[0])
    x = some_input()
    q, k, _ = attention(model)
    q(x)

    twin = copy.deepcopy(model)
    torch.save(model, io.BytesIO())

    assert torch.equal(attention(twin)[1](x), k(x))


def test_the_output_has_the_dtype_of_the_activations_with_a_bias(tmp_path: Path) -> None:
    q, _, _ = attention(load(write_checkpoint(tmp_path / "biased", 3, bias=True)))

    assert q(some_input().half()).dtype is torch.float16


def test_gradients_are_not_lost_to_an_output_without(two: tuple[Path, Path]) -> None:
    q, k, _ = attention(load(two[0]))
    x = some_input().requires_grad_()
    with torch.no_grad():
        q(x)

    assert k(x).requires_grad
