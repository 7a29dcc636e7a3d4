"""Projections that share one kernel call never answer with an output of other weights or of another input."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
from aliasparam_nvfp4.integrations.transformers import reload_folder, shared_call  # noqa: E402

from .test_transformers import load, write_checkpoint  # noqa: E402


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return write_checkpoint(tmp_path / "a", 1), write_checkpoint(tmp_path / "b", 2)


def attention(model: Any) -> tuple[Any, Any, Any]:
    block = model.model.layers[0].self_attn
    return block.q_proj, block.k_proj, block.v_proj


def within(model: Any, do: Callable[[Any, Any, Any], Any]) -> Any:
    """``do(q, k, v)`` as the forward of the attention that owns them."""
    block = model.model.layers[0].self_attn
    block.forward = lambda: do(*attention(model))
    try:
        return block()
    finally:
        del block.forward


def some_input() -> Tensor:
    return torch.randn(1, 3, 48, generator=torch.Generator().manual_seed(0)).bfloat16()


def counted(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each kernel call of the first attention's fused layer."""
    kind, calls = type(model.model.layers[0].self_attn.qkv_proj.nvfp4_backend), []
    apply = kind.apply
    monkeypatch.setattr(kind, "apply", lambda *a: calls.append(1) or apply(*a))
    return calls


def test_one_kernel_call_serves_all_projections_of_an_input(two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(two[0])
    calls, x = counted(model, monkeypatch), some_input()

    parts = within(model, lambda q, k, v: [q(x), k(x), v(x)])

    assert len(calls) == 1
    assert torch.equal(torch.cat(parts, -1), model.model.layers[0].self_attn.qkv_proj(x))
    calls.clear()
    model(torch.tensor([[1, 2, 3]]))
    assert len(calls) == 2 * 4, "qkv, o, gate_up and down of either layer"


def test_outside_of_its_owner_nothing_is_kept(two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(two[0])
    calls, x = counted(model, monkeypatch), some_input()
    seen = weakref.ref(x)
    q, k, _ = attention(model)

    old = q(x)
    x.data.mul_(2)  # no version tells of it

    assert torch.equal(k(x), k(x.clone())) and torch.equal(q(x), q(x.clone())) and not torch.equal(q(x), old)
    assert len(calls) == 6
    within(model, lambda q, k, v, x=x: q(x))
    del x
    gc.collect()
    assert seen() is None


def test_a_forward_that_raises_and_one_in_another_thread_share_nothing(two: tuple[Path, Path]) -> None:
    model, x = load(two[0]), some_input()

    def fail(q: Any, k: Any, v: Any) -> None:
        q(x)
        raise KeyError

    with pytest.raises(KeyError):
        within(model, fail)
    assert shared_call._running.get() is None

    def beside(q: Any, k: Any, v: Any) -> None:
        q(x)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(lambda: shared_call._running.get()).result() is None

    within(model, beside)


@pytest.mark.parametrize("later", [0, 1], ids=["the same projection", "another projection"])
def test_law_9_no_output_outlives_the_weights(two: tuple[Path, Path], later: int) -> None:
    model, cold, x = load(two[0]), load(two[1]), some_input()

    def reloaded_between(*projections: Any) -> Tensor:
        projections[0](x)
        reload_folder(model, two[1])
        return projections[later](x)

    assert torch.equal(within(model, reloaded_between), attention(cold)[later](x))


@pytest.mark.parametrize("later", [0, 1], ids=["the same projection", "another projection"])
def test_law_8_an_output_that_is_kept_does_not_bypass_the_refusal(two: tuple[Path, Path], later: int) -> None:
    model, x = load(two[0]), some_input()

    def written_between(*projections: Any) -> Tensor:
        projections[0](x)
        model.load_state_dict(load_file(two[1] / "model.safetensors"), strict=False)
        return projections[later](x)

    with pytest.raises(StaleKernelError):
        within(model, written_between)


def test_a_single_written_scale_is_seen_too(two: tuple[Path, Path]) -> None:
    model, x = load(two[0]), some_input()

    def scaled_between(q: Any, k: Any, v: Any) -> Tensor:
        q(x)
        for projection in (q, k, v):
            projection.input_scale.mul_(1.7)
        process(model)
        return k(x)

    assert torch.equal(within(model, scaled_between), attention(model)[1](x))


def test_a_written_input_is_another_input(two: tuple[Path, Path]) -> None:
    model, x = load(two[0]), some_input()

    def written(q: Any, k: Any, v: Any) -> Tensor:
        q(x)
        x.mul_(2)
        return k(x)

    assert torch.equal(within(model, written), attention(model)[1](x))


def test_another_backend_gives_another_output(two: tuple[Path, Path]) -> None:
    model, x = load(two[0]), some_input()

    def moved_between(q: Any, k: Any, v: Any) -> Tensor:
        q(x)
        retarget(model, "flashinfer_cutlass")  # the same format: nothing moves
        return k(x)

    with pytest.raises(Exception, match="cannot run here"):
        within(model, moved_between)


def test_gradients_are_not_lost_to_an_output_without(two: tuple[Path, Path]) -> None:
    model, x = load(two[0]), some_input().requires_grad_()

    def without_first(q: Any, k: Any, v: Any) -> Tensor:
        with torch.no_grad():
            q(x)
        return k(x)

    assert within(model, without_first).requires_grad


def test_a_model_copies_and_saves_within_a_forward(two: tuple[Path, Path]) -> None:
    model, x = load(two[0]), some_input()

    def copied(q: Any, k: Any, v: Any) -> Any:
        q(x)
        del model.model.layers[0].self_attn.forward
        torch.save(model, io.BytesIO())
        twin = copy.deepcopy(model)
        model.model.layers[0].self_attn.forward = None
        return twin

    twin = within(model, copied)
    assert torch.equal(attention(twin)[1](x), attention(model)[1](x))


def test_the_output_has_the_dtype_of_the_activations_with_a_bias(tmp_path: Path) -> None:
    q, _, _ = attention(load(write_checkpoint(tmp_path / "biased", 3, bias=True)))

    assert q(some_input().half()).dtype is torch.float16
