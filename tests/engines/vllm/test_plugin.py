"""The plugin itself: where it is in place, and what it says where it is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from .engine import model_of, start, stop, tokens  # skips without vLLM

from aliasparam_nvfp4.integrations.plugins import VLLM, Engine  # isort: skip
from aliasparam_nvfp4.integrations.serving import serving  # isort: skip
from aliasparam_nvfp4.integrations.vllm.check import missing_seams  # isort: skip


def test_it_is_in_place_after_start_and_registering_again_changes_nothing(dense: tuple[Path, Path]) -> None:
    from vllm.model_executor.model_loader.reload import layerwise

    from aliasparam_nvfp4.integrations.vllm import register

    llm = start(dense[0], skip_tokenizer_init=True)
    before = layerwise.make_online_process_loader
    register()
    assert missing_seams() == [] and layerwise.make_online_process_loader is before
    assert serving(model_of(llm)) == {"reference": 8}
    stop(llm)


def test_a_seam_that_somebody_replaced_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu_worker import Worker

    monkeypatch.setattr(Worker, "sleep", Worker.sleep.__wrapped__)
    assert missing_seams() == ["vllm.v1.worker.gpu_worker.Worker.sleep"]


def test_versions_and_plugins_that_are_left_out_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "served and reloaded by this package" in VLLM.verdict()
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    assert "leaves the plugin aliasparam_nvfp4 out" in VLLM.verdict()
    monkeypatch.setattr(Engine, "installed", lambda self: "0.40.1")
    assert VLLM.verdict().startswith("vLLM 0.40.1 is not 0.32 or later, below 0.34")


@pytest.mark.parametrize(("plugins", "version"), [("none", ""), ("", "0.40.1")])
def test_a_process_without_the_plugin_says_so(plugins: str, version: str) -> None:
    """Left out by the user, or in a version that is not known: vLLM's own NVFP4 is untouched, and a line says why."""
    code = f"""
from aliasparam_nvfp4.integrations.plugins import Engine, VLLM
if {version!r}:
    Engine.installed = lambda self: {version!r}
from vllm.plugins import load_general_plugins
load_general_plugins()
from aliasparam_nvfp4.integrations.vllm.check import missing_seams
print(len(missing_seams()), VLLM.verdict())
"""
    environment = os.environ | ({"VLLM_PLUGINS": plugins} if plugins else {}) | {"VLLM_LOGGING_LEVEL": "WARNING"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    missing, _, verdict = done.stdout.strip().splitlines()[-1].partition(" ")
    assert int(missing) > 15
    assert ("leaves the plugin" if plugins else "0.40.1 is not 0.32 or later") in verdict
    assert plugins or "aliasparam_nvfp4 is not in place: vLLM 0.40.1" in done.stdout + done.stderr


def test_unknown_options_are_refused(dense: tuple[Path, Path]) -> None:
    with pytest.raises(Exception, match="no such option"):
        start(dense[0], skip_tokenizer_init=True, additional_config={"aliasparam_nvfp4": {"polcy": "staged"}})


def test_compiled_code_serves_new_weights(dense: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torch.compile by vLLM: the compiled engine reloaded answers as one that was started with the new weights."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    from aliasparam import invalidate

    from .engine import digest, reload

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    compiled = {"enforce_eager": False, "skip_tokenizer_init": True}
    fresh = start(dense[1], **compiled)
    of_b = digest(fresh), tokens(fresh)
    stop(fresh)
    llm = start(dense[0], **compiled)
    a = tokens(llm)
    assert llm.llm_engine.vllm_config.compilation_config.mode.name != "NONE"
    reload(llm, weights_path=str(dense[1]))
    assert (digest(llm), tokens(llm)) == of_b and a != of_b[1]
    invalidate(model_of(llm))
    with monkeypatch.context() as patch:  # it is asked before it runs: inductor's code, compiled without guards, would not ask
        patch.setattr(CPUModelRunner, "_model_forward", lambda *_, **__: pytest.fail("it ran"))
        assert tokens(llm) == [] and tokens(llm) == []
    reload(llm, weights_path=str(dense[1]))
    assert (digest(llm), tokens(llm)) == of_b
    stop(llm)


def test_sleep_of_level_1_comes_back_and_of_level_2_saves_no_kernel_name_and_refuses_until_a_reload(
    dense: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own ``Worker.sleep`` and ``wake_up``, with a stand-in for CUDA's allocator: at level 1 it brings back what it
    held, at level 2 it forgets it."""
    from vllm.v1.worker.gpu_worker import Worker

    from .engine import addresses, digest, reload

    llm = start(dense[0], skip_tokenizer_init=True)
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    model, a, before = model_of(llm), (digest(llm), tokens(llm)), addresses(llm)
    of_vllm = {name for name, _ in model.named_buffers() if "rotary" in name}

    class Allocator:
        def suspend(self, level: int) -> None:
            buffers = [b.data.reshape(-1).view(torch.uint8) for b in torch.nn.Module.buffers(model) if type(b) is torch.Tensor]
            self.kept = [(memory, memory.clone()) for memory in buffers if level == 1]
            for memory in buffers:
                memory.random_()

        def resume(self, tags: Any) -> None:
            for memory, was in self.kept:
                memory.copy_(was)

    worker._sleep_mode_backend = Allocator()
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *a: None)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda *a: (0, 1))
    monkeypatch.setattr(type(worker), "synchronize_device", lambda self: None, raising=False)

    Worker.sleep(worker, 1)
    Worker.wake_up(worker)
    assert (digest(llm), tokens(llm)) == a and addresses(llm) == before

    Worker.sleep(worker, 2)
    saved = set(worker._sleep_saved_buffers)
    assert (
        of_vllm
        and of_vllm <= saved
        and not [name for name in saved if "prepared" in name or "interleaved" in name or "alpha" in name]
    )
    Worker.wake_up(worker)
    assert tokens(llm) == []
    reload(llm, weights_path=str(dense[0]))
    assert (digest(llm), tokens(llm)) == a and addresses(llm) == before
    stop(llm)
