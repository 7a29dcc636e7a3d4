"""SGLang's own runner, loaders and updater over the demo's model: what an update leaves, and what the stock updater would."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("sglang", reason="SGLang is not installed: make test-sglang")

from aliasparam import checkpoint_digest
from aliasparam.errors import AliasError

from .folders import DENSE, need_dense

SMOLLM = {"hidden_size": 577}
DOWN = "model.layers.7.mlp.down_proj.weight"
OUT = "model.layers.3.self_attn.o_proj.weight"


class Dense:
    """The demo's A in a runner, and what a fresh load of each folder serves."""

    def __init__(self) -> None:
        from .runner import Runner

        fresh = Runner(DENSE["b"])
        self.b, self.digest_b = fresh.logits(), digest(fresh.model)
        self.runner = Runner(DENSE["a"])
        self.a, self.digest_a = self.runner.logits(), digest(self.runner.model)
        self.updater, self.model, self.addresses = self.runner.updater, self.runner.model, self.runner.addresses()

    def update(self, folder: Path) -> tuple[bool, str]:
        return self.updater.update_weights_from_disk(str(folder), "auto")  # type: ignore[no-any-return]

    def serves(self, tag: str) -> bool:
        logits, whole = (self.a, self.digest_a) if tag == "a" else (self.b, self.digest_b)
        same = torch.equal(self.runner.logits(), logits) and digest(self.model) == whole
        return same and self.runner.addresses() == self.addresses


def digest(model: Any) -> str:
    return checkpoint_digest(model).whole


@pytest.fixture(scope="module")
def dense() -> Dense:
    from sglang.srt.plugins import load_plugins

    need_dense()
    load_plugins()
    return Dense()


@pytest.fixture(autouse=True)
def _serving_a(dense: Dense) -> Iterator[None]:
    yield
    try:
        serving = dense.serves("a")
    except AliasError:  # the stock updater left it half written
        serving = False
    if not serving:
        success, said = dense.update(DENSE["a"])
        assert success and dense.serves("a"), said


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
    from aliasparam.module.registry_of import registries

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


def stock_update(dense: Dense, folder: Path) -> tuple[bool, str]:
    return type(dense.updater).update_weights_from_disk.__wrapped__(dense.updater, str(folder), "auto")  # type: ignore[no-any-return]


def checkpoint_changed(dense: Dense) -> bool:
    files = load_file(DENSE["a"] / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    return not torch.equal(dense.model.get_parameter(name).detach().clone(), files[name])


# -- sessions ----------------------------------------------------------------------------------------------------------


def tensors_of(tag: str, part: str = "") -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in load_file(DENSE[tag] / "model.safetensors").items() if part in name]


def session(dense: Dense, *updates: list[tuple[str, Tensor]], **options: Any) -> list[tuple[bool, str]]:
    dense.updater.begin_weight_update()
    answers = [dense.updater.update_weights_from_tensor(tensors, **options) for tensors in updates]
    assert dense.serves("a")  # until the end the old weights do
    dense.updater.end_weight_update(run_post_load=not updates)
    return answers


def test_an_empty_session_changes_nothing(dense: Dense) -> None:
    session(dense)
    assert dense.serves("a")


def test_a_partial_session_changes_its_layer_and_no_other(dense: Dense) -> None:
    before = dict(checkpoint_digest(dense.model).tensors)
    session(dense, tensors_of("b", ".layers.3."))
    after = dict(checkpoint_digest(dense.model).tensors)
    assert {name for name in after if before[name] != after[name]} <= {name for name in after if ".layers.3." in name}
    assert before != after
    in_pieces(dense, "b")
    assert dense.serves("b")


def in_pieces(dense: Dense, tag: str) -> None:
    """The whole model, as trainers send it."""
    dense.updater.begin_weight_update()
    whole = tensors_of(tag)
    for first in range(0, len(whole), 100):
        assert dense.updater.update_weights_from_tensor(whole[first : first + 100])[0]
    dense.updater.end_weight_update(run_post_load=False)


def test_only_a_part_of_a_fused_projection_is_refused(dense: Dense) -> None:
    with pytest.raises(Exception, match="did not arrive whole"):
        session(dense, tensors_of("b", ".layers.3.self_attn.q_proj"))
    assert dense.serves("a")


def test_a_tensor_that_does_not_fit_aborts_the_session(dense: Dense) -> None:
    good, bad = tensors_of("b", ".layers.3."), [(OUT.replace("3", "4", 1), torch.zeros(100, 288, dtype=torch.uint8))]
    dense.updater.begin_weight_update()
    assert dense.updater.update_weights_from_tensor(good)[0]
    success, said = dense.updater.update_weights_from_tensor(bad)
    assert not success and "expected: uint8[576, 288]" in said
    assert not dense.updater.update_weights_from_tensor(good)[0]
    with pytest.raises(Exception, match="was aborted"):
        dense.updater.end_weight_update(run_post_load=False)
    assert dense.serves("a")


@pytest.mark.parametrize("policy", ["write-through", "journal", "staged"])
def test_every_policy_serves_the_new_weights(dense: Dense, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIASPARAM_NVFP4_SESSION_POLICY", policy)
    in_pieces(dense, "b")
    assert dense.serves("b")


def test_a_bucket_and_names_of_the_model_itself(dense: Dense) -> None:
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    named = tensors_of("b", ".layers.3.mlp.down_proj")
    bucket = FlattenedTensorBucket(named_tensors=named)
    flat = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
    session(dense, flat, load_format="flattened_bucket")  # type: ignore[arg-type]
    for name, tensor in named:
        assert torch.equal(dense.model.get_parameter(name).detach().clone().view(torch.uint8).reshape(-1), raw(tensor))
    direct = [(n, t.reshape(dense.model.get_parameter(n).shape)) for n, t in tensors_of("a", ".layers.3.mlp.down_proj")]
    dense.updater.begin_weight_update()
    assert dense.updater.update_weights_from_tensor(direct, load_format="direct")[0]
    dense.updater.end_weight_update(run_post_load=False)
    assert dense.serves("a")


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


# -- deltas, sleep, the checker ----------------------------------------------------------------------------------------


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


def test_sleep_does_not_save_kernel_names(dense: Dense) -> None:
    from sglang.srt.managers.scheduler_components import weight_updater

    stock = weight_updater._export_static_state.__wrapped__(dense.model)
    state = weight_updater._export_static_state(dense.model)
    saved, by_stock = (sum(tensor.nbytes for _, tensor in s["buffers"]) for s in (state, stock))
    assert 0 < saved < by_stock / 40
    weight_updater._import_static_state(dense.model, state)
    assert dense.serves("a")
    session(dense, tensors_of("a", ".layers.3."))  # and partial updates go on being right
    assert dense.serves("a")


def test_memory_that_was_given_back_while_the_engine_slept_refuses_until_weights_are_loaded(dense: Dense) -> None:
    """The engine's own order, with a stand-in for torch_memory_saver, which is CUDA's."""
    from aliasparam_nvfp4.integrations.sglang import sleep

    worker = SimpleNamespace(model_runner=SimpleNamespace(model=dense.model))
    manager = SimpleNamespace(memory_saver_adapter=SimpleNamespace(enabled=True), tp_worker=worker)
    sleep.resume(lambda *_: None, manager, SimpleNamespace(tags=["kv_cache"]))
    assert dense.serves("a")
    sleep.resume(lambda *_: None, manager, SimpleNamespace(tags=None))
    with pytest.raises(AliasError):
        dense.runner.logits()
    assert dense.update(DENSE["a"])[0] and dense.serves("a")


def test_the_weights_checker_sees_checkpoint_values(dense: Dense) -> None:
    from sglang.srt.utils.weight_checker import WeightChecker

    checker = WeightChecker(get_model=lambda: dense.model)
    with torch.no_grad():
        first = checker.handle("checksum", role="target")
        checker.handle("snapshot", role="target")
        checker.handle("reset_tensors", role="target")
        with pytest.raises(Exception, match="open"):
            dense.runner.logits()
        assert dense.update(DENSE["b"])[0]
        assert checker.handle("checksum", role="target")["per_gpu_checksum"] != first["per_gpu_checksum"]
        assert dense.update(DENSE["a"])[0]
        assert checker.handle("checksum", role="target") == first
    assert not any(name.endswith(("weight_prepared", "alpha")) for name in first["checksums"])


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
