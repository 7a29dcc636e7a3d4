"""The plugin itself: where it is in place, and what it says where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from .engine import model_of, start, stop, tokens  # skips without vLLM

from aliasparam_nvfp4.integrations.vllm import versions  # isort: skip
from aliasparam_nvfp4.integrations.vllm.check import missing_seams, serving  # isort: skip


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

    monkeypatch.setattr(Worker, "sleep", Worker.sleep._aliasparam_original)
    assert missing_seams() == ["Worker.sleep"]


def test_versions_and_plugins_that_are_left_out_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "served and reloaded by this package" in versions.verdict()
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    assert "leaves the plugin aliasparam_nvfp4 out" in versions.verdict()
    monkeypatch.setattr(versions, "installed", lambda: "0.40.1")
    assert versions.verdict().startswith("vLLM 0.40.1 is not in 0.32 to 0.33")


def test_unknown_options_are_refused(dense: tuple[Path, Path]) -> None:
    with pytest.raises(Exception, match="no such option"):
        start(dense[0], skip_tokenizer_init=True, additional_config={"aliasparam_nvfp4": {"polcy": "staged"}})


def test_compiled_code_serves_new_weights(dense: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torch.compile by vLLM: the compiled engine reloaded answers as one that was started with the new weights."""
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
    stop(llm)


def test_sleep_of_level_2_saves_no_kernel_name_and_refuses_until_a_reload(
    dense: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own ``Worker.sleep`` and ``wake_up``, with a stand-in for CUDA's allocator that forgets what it held."""
    from vllm.v1.worker.gpu_worker import Worker

    from .engine import addresses, digest, reload

    llm = start(dense[0], skip_tokenizer_init=True)
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    model, a, before = model_of(llm), (digest(llm), tokens(llm)), addresses(llm)
    of_vllm = {name for name, _ in model.named_buffers() if "rotary" in name}

    class Allocator:
        def suspend(self, level: int) -> None:
            for buffer in torch.nn.Module.buffers(model):
                if type(buffer) is torch.Tensor:
                    buffer.data.reshape(-1).view(torch.uint8).random_()

        def resume(self, tags: Any) -> None: ...

    worker._sleep_mode_backend = Allocator()
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *a: None)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda *a: (0, 1))
    monkeypatch.setattr(type(worker), "synchronize_device", lambda self: None, raising=False)

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


def test_a_buffer_that_is_used_again_beside_vllm_alone(
    dense: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a model in bf16, where vLLM's own layers wait for q, k and v by reference."""
    from vllm.model_executor.model_loader.reload import layerwise

    from .engine import reload
    from .tiny import tiny_plain

    folder = tiny_plain(tmp_path / "plain", 0)
    llm = start(folder, skip_tokenizer_init=True)
    right = tokens(llm)

    from safetensors.torch import load_file

    def one_buffer() -> Any:
        found = load_file(folder / "model.safetensors")
        buffer = torch.empty(max(t.numel() for t in found.values()), dtype=torch.bfloat16)
        for name, tensor in found.items():
            yield name, buffer[: tensor.numel()].view(tensor.shape).copy_(tensor)
            buffer.fill_(7)

    reload(llm, weights_iterator=one_buffer())
    assert tokens(llm) == right
    with monkeypatch.context() as alone:
        original = layerwise.make_online_process_loader._aliasparam_original
        alone.setattr(layerwise, "make_online_process_loader", original)
        reload(llm, weights_iterator=one_buffer())
    assert tokens(llm) != right
    stop(llm)
