"""Folders with more than one checkpoint: transformers reads plain tensors of the same files as this package experts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aliasparam_nvfp4.checkpoint import CheckpointError

transformers = pytest.importorskip("transformers")
from aliasparam_nvfp4.integrations.transformers import reload_folder, use_backend  # noqa: E402

from .test_transformers import load, out, write_checkpoint  # noqa: E402


def variant(a: Path, b: Path) -> dict[str, str]:
    shutil.copy(b / "model.safetensors", a / "model.b.safetensors")
    return {"variant": "b"}


def index_of_another(a: Path, b: Path) -> dict[str, str]:
    load(b).save_pretrained(b / "shards", max_shard_size="10KB")
    for file in (b / "shards").glob("model*"):
        shutil.copy(file, a)
    return {}


@pytest.mark.parametrize("beside", [variant, index_of_another])
def test_law_8_a_model_is_of_one_checkpoint_or_refused(beside: Callable[[Path, Path], dict[str, str]], tmp_path: Path) -> None:
    """Experts came from one and everything else from the other."""
    a, b = write_checkpoint(tmp_path / "a", 1), write_checkpoint(tmp_path / "b", 2)
    serving = load(a)
    before, options = out(serving), beside(a, b)

    with use_backend("reference"), pytest.raises(CheckpointError, match="transformers would read other files"):
        transformers.AutoModelForCausalLM.from_pretrained(a, **options)
    if not options:
        with pytest.raises(CheckpointError, match="transformers would read other files"):
            reload_folder(serving, a)
    assert torch.equal(out(serving), before)


def test_an_index_of_the_same_file_loads_and_reloads(tmp_path: Path) -> None:
    a = write_checkpoint(tmp_path / "a", 1)
    sharded = tmp_path / "sharded"
    load(a).save_pretrained(sharded, max_shard_size="10KB")
    model = load(sharded)

    assert torch.equal(out(model), out(load(a)))
    reload_folder(model, a)
    reload_folder(model, sharded)
    assert torch.equal(out(model), out(load(a)))
