"""Folders and deltas that replace what SGLang's own runner serves: what an update leaves, and what the stock updater would."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("sglang", reason="SGLang is not installed: make test-sglang")

from .dense import OUT, Dense, digest
from .folders import DENSE

SMOLLM = {"hidden_size": 577}
DOWN = "model.layers.7.mlp.down_proj.weight"


def test_the_plugin_is_in_place_and_says_so(dense: Dense, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.managers.scheduler_components import weight_updater

    from aliasparam_nvfp4.integrations.sglang.check import check_installed, status
    from aliasparam_nvfp4.integrations.sglang.plugin import register

    register()  # as SGLang may: nothing is hooked twice
    check_installed()
    assert "in place" in status()
    stock = weight_updater._export_static_state.__wrapped__
    monkeypatch.setattr(weight_updater, "_export_static_state", stock)
    with pytest.raises(RuntimeError, match="_export_static_state"):
        check_installed()


def test_a_model_that_is_loaded_where_a_hook_is_not_in_place_says_so(
    monkeypatch: pytest.MonkeyPatch, dense: Dense, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where it is the hook on a class, and so nothing of the model is ours."""
    from sglang.srt.layers.quantization import modelopt_quant

    from aliasparam_nvfp4.integrations.sglang.served import record

    record(lambda *_: None, torch.nn.Linear(2, 2), [], torch.device("cpu"))
    assert "in part only" not in caplog.text
    method = modelopt_quant.ModelOptFp4LinearMethod
    monkeypatch.setattr(method, "__init__", method.__init__.__wrapped__)
    record(lambda *_: None, torch.nn.Linear(2, 2), [], torch.device("cpu"))
    assert "in part only; missing: sglang.srt.layers.quantization.modelopt_quant.ModelOptFp4LinearMethod.__init__" in caplog.text


def test_a_model_that_refuses_is_asked_before_it_runs(dense: Dense) -> None:
    """A graph that SGLang captured would not ask."""
    from aliasparam import invalidate
    from aliasparam.errors import StateError
    from aliasparam_nvfp4.integrations.sglang.failed_step import forward

    worker = SimpleNamespace(model_runner=SimpleNamespace(model=dense.model))
    assert forward(lambda *_: "ran", worker, None) == "ran"
    invalidate(dense.model)
    with pytest.raises(StateError, match="open"):
        forward(lambda *_: "ran", worker, None)


def test_a_tensor_that_a_loader_passes_over_is_missed(dense: Dense, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's loaders log a name that they do not find, and go on."""
    kind = type(dense.model)
    load = kind.load_weights
    passes_over = lambda model, weights: load(model, (pair for pair in weights if pair[0] != OUT))  # noqa: E731
    monkeypatch.setattr(kind, "load_weights", passes_over)
    success, said = dense.update(DENSE["b"])
    assert not success and OUT in said and dense.serves("a")


def test_a_folder_is_served_as_if_it_was_loaded_first(dense: Dense) -> None:
    assert not torch.equal(dense.a, dense.b)
    assert dense.update(DENSE["b"]) == (True, "Succeeded to update model weights.")
    assert dense.serves("b") and dense.runner.runner.model_config.model_path == str(DENSE["b"])


def test_what_a_fused_projection_has_of_each_part_is_the_folder_byte_for_byte(dense: Dense) -> None:
    """An oracle beside the engine's loaders: rows of q, k and v, and the scale of each, whose ratios are no powers of two."""
    files = load_file(DENSE["a"] / "model.safetensors")
    attention = "model.layers.0.self_attn"
    for name in ("weight", "weight_scale", "weight_scale_2"):
        parts = [files[f"{attention}.{part}_proj.{name}"] for part in "qkv"]
        whole = torch.cat([part.reshape(-1, *part.shape[1:]).view(torch.uint8) for part in parts])
        found = dense.model.get_parameter(f"{attention}.qkv_proj.{name}").detach().clone()
        assert torch.equal(found.view(torch.uint8).reshape(-1), whole.reshape(-1))


Change = Callable[[dict[str, Tensor]], object]
BAD: dict[str, tuple[Change, dict[str, Any], str]] = {
    "a tensor is missing": (lambda t: t.pop(DOWN), {}, "missing: model.layers.7"),
    "a tensor is cut": (lambda t: t.update({DOWN: t[DOWN][:, :100].contiguous()}), {}, "found uint8[576, 100]"),
    "one is too many": (lambda t: t.update({f"{DOWN}_zero": torch.ones(3)}), {}, "unexpected: model.layers.7"),
    "a global scale is NaN": (lambda t: t.update({f"{DOWN}_scale_2": torch.tensor(torch.nan)}), {}, "is not a scale"),
    "block scales are NaN": (lambda t: t.update({f"{DOWN}_scale": nan(t[f"{DOWN}_scale"])}), {}, "block scales are NaN"),
    "another model": (lambda t: None, SMOLLM, "another model"),
}


def nan(scales: Tensor) -> Tensor:
    return torch.full_like(scales.view(torch.uint8), 0x7F).view(scales.dtype)


@pytest.mark.parametrize("what", BAD)
def test_a_bad_folder_is_refused_before_the_first_write(dense: Dense, what: str, tmp_path: Path) -> None:
    change, config, message = BAD[what]
    bad = folder_of(tmp_path / "bad", change, config)
    writes = [storage.version for storage in storages(dense.model)]
    success, said = dense.update(bad)
    assert not success and message in said and "the old weights serve" in said
    assert writes == [storage.version for storage in storages(dense.model)] and dense.serves("a")
    assert dense.runner.runner.model_config.model_path == str(DENSE["a"])


def storages(model: Any) -> list[Any]:
    from aliasparam.module.registry import registries

    return [storage for _, registry in registries(model) for storage in registry.storages()]


def folder_of(path: Path, change: Change, config: dict[str, Any]) -> Path:
    tensors = load_file(DENSE["b"] / "model.safetensors")
    change(tensors)
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((DENSE["b"] / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps(fields))
    return path


def test_a_read_that_fails_half_way_is_taken_back(dense: Dense, monkeypatch: pytest.MonkeyPatch) -> None:
    from aliasparam_nvfp4.checkpoint import CheckpointFolder

    read, left = CheckpointFolder.read, [1100]

    def failing(folder: Any, name: str, *args: Any) -> Tensor:
        left[0] -= 1
        if not left[0]:
            raise OSError("the disk went away")
        return read(folder, name, *args)

    monkeypatch.setattr(CheckpointFolder, "read", failing)
    success, said = dense.update(DENSE["b"])
    assert left[0] == 0 and not success and "the disk went away" in said and dense.serves("a")


def test_the_stock_updater_rolls_back_to_the_new_folder_and_raises(dense: Dense, tmp_path: Path) -> None:
    """Defect 2. In an engine what is raised here ends the scheduler."""
    bad = folder_of(tmp_path / "bad", lambda t: t.update({"model.norm.weight": torch.ones(100, dtype=torch.bfloat16)}), {})
    with pytest.raises(AssertionError, match="Attempted to load weight"):
        stock_update(dense, bad)
    assert dense.runner.runner.model_config.model_path == str(bad)
    assert checkpoint_changed(dense)  # some layers have B's weights
    success, said = dense.update(bad)
    assert not success and "model.norm.weight: expected bfloat16[576], found bfloat16[100]" in said


def test_the_stock_updater_fills_what_is_short_with_zeros(dense: Dense, tmp_path: Path) -> None:
    """On a CPU; ours refuses the same folder above."""
    bad = folder_of(tmp_path / "bad", lambda t: t.update({OUT: t[OUT][:, :100].contiguous()}), {})
    assert stock_update(dense, bad)[0]
    assert not dense.model.get_parameter(OUT).detach().clone()[:, 100:].any()


def test_the_stock_updater_reports_a_failure_and_serves_the_new_weights(dense: Dense, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that fails once: it "rolls back" by reading the new folder again. Ours is taken back above."""
    from sglang.srt.model_loader.loader import DefaultModelLoader

    read, fails = DefaultModelLoader._get_weights_iterator, [True]

    def failing(loader: Any, source: Any) -> Any:
        for number, pair in enumerate(read(loader, source)):
            if number == 300 and fails:
                fails.clear()
                raise OSError("the disk went away")
            yield pair

    monkeypatch.setattr(DefaultModelLoader, "_get_weights_iterator", failing)
    success, said = stock_update(dense, DENSE["b"])
    assert not fails and not success and "Rolling back to original weights" in said
    assert dense.serves("b")


def stock_update(dense: Dense, folder: Path) -> tuple[bool, str]:
    return type(dense.updater).update_weights_from_disk.__wrapped__(dense.updater, str(folder), "auto")  # type: ignore[no-any-return]


def checkpoint_changed(dense: Dense) -> bool:
    files = load_file(DENSE["a"] / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    return not torch.equal(dense.model.get_parameter(name).detach().clone(), files[name])


# -- deltas -------------------------------------------------------------------------------------------------------------


def test_a_chain_of_deltas_is_applied_without_a_copy_of_the_checkpoint(dense: Dense, tmp_path: Path) -> None:
    from aliasparam.reload.delta_writer import diff
    from aliasparam.reload.sources import SafetensorsFolder

    with SafetensorsFolder(DENSE["a"]) as a, SafetensorsFolder(DENSE["b"]) as b:
        diff(a, b, tmp_path / "weight_v000001", 1, 0)
        diff(b, a, tmp_path / "weight_v000002", 2, 1, encoding="overwrite")
        diff(a, b, tmp_path / "weight_v000003", 3, 2)
    assert dense.update(tmp_path / "weight_v000001")[0] and dense.serves("b")
    assert dense.runner.runner.model_config.model_path == str(DENSE["a"])  # a delta is no folder to start from
    assert dense.update(tmp_path / "weight_v000003")[0] and dense.serves("b")
    success, said = dense.update(tmp_path / "weight_v000001")
    assert not success and "older than what serves" in said and dense.serves("b")
    shutil.rmtree(tmp_path / "weight_v000002")
    assert dense.update(DENSE["a"])[0]
    success, said = dense.update(tmp_path / "weight_v000003")
    assert not success and "weight_v000002" in said


def test_a_delta_on_other_weights_is_refused(dense: Dense, tmp_path: Path) -> None:
    from aliasparam.reload.delta_writer import diff
    from aliasparam.reload.sources import SafetensorsFolder

    with SafetensorsFolder(DENSE["a"]) as a, SafetensorsFolder(DENSE["b"]) as b:
        diff(b, a, tmp_path / "weight_v000001", 1, 0)
    success, said = dense.update(tmp_path / "weight_v000001")
    assert not success and "checksum" in said and dense.serves("a")


def test_a_delta_to_nan_block_scales_is_refused_before_the_first_write(dense: Dense, tmp_path: Path) -> None:
    from aliasparam.reload.delta_writer import diff
    from aliasparam.reload.sources import SafetensorsFolder

    bad = folder_of(tmp_path / "bad", BAD["block scales are NaN"][0], {})
    with SafetensorsFolder(DENSE["a"]) as a, SafetensorsFolder(bad) as b:
        diff(a, b, tmp_path / "weight_v000001", 1, 0)
    writes = [storage.version for storage in storages(dense.model)]
    success, said = dense.update(tmp_path / "weight_v000001")
    assert not success and "block scales are NaN" in said and "model.layers.7.mlp.down_proj.weight_scale" in said
    assert writes == [storage.version for storage in storages(dense.model)] and dense.serves("a")


# -- kernel formats of GPUs that are not here ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["flashinfer_trtllm", "flashinfer_cutlass"])
def test_kernel_bytes_of_other_formats_go_through_the_engine(dense: Dense, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from .runner import Runner

    monkeypatch.setenv("ALIASPARAM_NVFP4_BACKEND", backend)
    runner = Runner(DENSE["a"])
    where = runner.addresses()
    assert torch.allclose(runner.logits(), dense.a, atol=1e-2) and digest(runner.model) == dense.digest_a
    assert runner.updater.update_weights_from_disk(str(DENSE["b"]), "auto")[0]
    assert torch.allclose(runner.logits(), dense.b, atol=1e-2) and digest(runner.model) == dense.digest_b
    assert runner.addresses() == where
