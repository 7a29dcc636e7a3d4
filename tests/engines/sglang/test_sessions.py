"""Sessions, sleep and the weights checker of SGLang's own runner: what arrives in pieces is served whole or not at all."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("sglang", reason="SGLang is not installed: make test-sglang")

from aliasparam import checkpoint_digest
from aliasparam.errors import AliasError

from .dense import OUT, Dense, in_pieces, session, tensors_of
from .folders import DENSE


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


# -- sleep and the checker ----------------------------------------------------------------------------------------------


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
