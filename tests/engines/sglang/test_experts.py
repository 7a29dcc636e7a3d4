"""A tiny Qwen3-MoE in SGLang's runner: experts on every format, updates, and experts that change ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("sglang", reason="SGLang is not installed: make test-sglang")

from aliasparam import checkpoint_digest

from ..w4a16 import as_w4a16
from .folders import moe

RUNNERS = ["reference", "flashinfer_trtllm", "flashinfer_cutlass", "flashinfer_cutedsl"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    where = tmp_path_factory.mktemp("experts")
    return {tag: moe(where / tag, seed) for seed, tag in enumerate("ab")}


def served(runner: Any) -> tuple[Any, str]:
    return runner.logits(), checkpoint_digest(runner.model).whole


def same(first: tuple[Any, str], second: tuple[Any, str]) -> bool:
    return torch.equal(first[0], second[0]) and first[1] == second[1]


@pytest.mark.parametrize("backend", RUNNERS)
def test_experts_are_served_as_if_they_were_loaded_first(
    folders: dict[str, Path], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from .runner import Runner

    monkeypatch.setenv("ALIASPARAM_NVFP4_MOE_BACKEND", backend)
    cold = {tag: served(Runner(folder)) for tag, folder in folders.items()}
    runner = Runner(folders["a"])
    where = runner.addresses()
    assert not torch.equal(cold["a"][0], cold["b"][0])
    assert runner.updater.update_weights_from_disk(str(folders["b"]), "auto")[0] and same(served(runner), cold["b"])
    runner.updater.begin_weight_update()
    assert runner.updater.update_weights_from_tensor(list(load_file(folders["a"] / "model.safetensors").items()))[0]
    runner.updater.end_weight_update(run_post_load=False)
    assert same(served(runner), cold["a"]) and runner.addresses() == where


def test_input_scales_that_a_w4a16_folder_still_has_are_passed_over(folders: dict[str, Path], tmp_path: Path) -> None:
    """They are no part of what is served: folders with and without them serve the same, and reload into each other."""
    from .runner import Runner

    made = {tag: as_w4a16(folder, tmp_path / tag) for tag, folder in folders.items()}
    bare = as_w4a16(folders["b"], tmp_path / "bare", bare=True)
    cold, runner = Runner(bare).logits(), Runner(made["a"])
    first = runner.logits()
    for folder in (made["b"], bare):
        assert runner.updater.update_weights_from_disk(str(folder), "auto")[0]
        assert torch.equal(runner.logits(), cold) and not torch.equal(cold, first)
        assert runner.updater.update_weights_from_disk(str(made["a"]), "auto")[0] and torch.equal(runner.logits(), first)


def test_one_expert_alone_is_a_partial_update_that_is_refused(folders: dict[str, Path]) -> None:
    """Its tensors are rows of fused ones; which others would have been meant nobody can know."""
    from .runner import Runner

    runner = Runner(folders["a"])
    before = served(runner)
    named = [(n, t) for n, t in load_file(folders["b"] / "model.safetensors").items() if ".layers.0.mlp.experts.3." in n]
    runner.updater.begin_weight_update()
    assert runner.updater.update_weights_from_tensor(named)[0]
    with pytest.raises(Exception, match="did not arrive whole"):
        runner.updater.end_weight_update(run_post_load=False)
    assert same(served(runner), before)


def test_a_delta_of_experts(folders: dict[str, Path], tmp_path: Path) -> None:
    from aliasparam.reload.delta_writer import diff
    from aliasparam.reload.sources import SafetensorsFolder

    from .runner import Runner

    with SafetensorsFolder(folders["a"]) as a, SafetensorsFolder(folders["b"]) as b:
        diff(a, b, tmp_path / "weight_v000001", 1, 0)
    cold, runner = served(Runner(folders["b"])), Runner(folders["a"])
    assert runner.updater.update_weights_from_disk(str(tmp_path / "weight_v000001"), "auto")[0]
    assert same(served(runner), cold)


def test_experts_change_places_in_kernel_order(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's own EPLB updater: every expert one place further, then back; the bytes are those of the checkpoint's experts."""
    from sglang.srt.eplb.expert_location import ExpertLocationMetadata, set_global_expert_location_metadata
    from sglang.srt.eplb.expert_location_updater import ExpertLocationUpdater

    from .runner import Runner

    monkeypatch.setenv("ALIASPARAM_NVFP4_MOE_BACKEND", "flashinfer_trtllm")
    runner = Runner(folders["a"])
    before, config = served(runner), runner.runner.model_config
    experts = runner.model.model.layers[0].mlp.experts
    w13, alphas = experts.w13_weight.detach().clone(), experts.g1_alphas.clone()
    turned = torch.arange(8).roll(1)
    for places, expected in ((turned, turned), (torch.arange(8), torch.arange(8))):
        new = ExpertLocationMetadata.init_by_mapping(config, places.repeat(2, 1), moe_ep_rank=0)
        weights = runner.model.routed_experts_weights_of_layer.value
        mover = ExpertLocationUpdater()
        mover._first_execution = False  # it would empty the cache of a CPU, which has none
        mover.update(weights, new, [0, 1], nnodes=1, rank=0)
        assert torch.equal(experts.w13_weight.detach().clone(), w13[expected])
        assert torch.equal(experts.g1_alphas, alphas[expected])  # derived again
        logits = runner.logits()
    assert torch.equal(logits, before[0]) and served(runner)[1] == before[1]
    set_global_expert_location_metadata(None, allow_overwrite=True)
