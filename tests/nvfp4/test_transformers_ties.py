"""A head that the config ties to the embedding, and that the files have too."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aliasparam.reload.delta_folder import Chain
from aliasparam.reload.delta_writer import diff
from aliasparam.reload.sources import SafetensorsFolder
from aliasparam_nvfp4.checkpoint import CheckpointError
from aliasparam_nvfp4.cli.digest import folder_digest, model_digest

pytest.importorskip("transformers")
from aliasparam_nvfp4.integrations.transformers import apply_delta_folder, reload_folder

from .test_transformers import load, out, write_checkpoint


def with_head(folder: Path, made: Path, change: int) -> Path:
    """A copy of the folder that has the head too, which the config ties to the embedding."""
    shutil.copytree(folder, made)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + change
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    return made


@pytest.mark.parametrize("change", [0, 1])
@pytest.mark.parametrize("way", ["folder", "full", "delta"])
def test_law_9_a_head_in_the_files_is_tied_if_it_is_equal(way: str, change: int, tmp_path: Path) -> None:
    """As a cold load does it; a model that is tied has no place for another."""
    a = with_head(write_checkpoint(tmp_path / "a", 1), tmp_path / "heads" / "a", 0)
    b = with_head(write_checkpoint(tmp_path / "b", 2), tmp_path / "heads" / "weight_v000001", change)
    if way == "delta":
        with SafetensorsFolder(a) as old, SafetensorsFolder(b) as new:
            diff(old, new, tmp_path / "deltas" / "weight_v000001", 1, 0)
    model, cold = load(a), load(b)
    before = out(model)
    meta = torch.device("meta")  # as torch's default device: what reloads make on the host says so
    with (
        meta,
        contextlib.nullcontext() if not change else pytest.raises(CheckpointError, match=r"lm_head.weight: .* the model ties"),
    ):
        if way == "folder":
            reload_folder(model, b)
        else:
            with Chain(tmp_path / ("heads" if way == "full" else "deltas"), 0, 1) as chain:
                apply_delta_folder(model, chain)
    assert torch.equal(out(model), before if change else out(cold))
    assert (cold.lm_head.weight is cold.model.embed_tokens.weight) == (not change)


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16), (torch.float32, torch.float32)]
)
def test_law_9_a_head_of_another_dtype_is_tied_if_it_is_equal_in_the_models(
    dtypes: tuple[torch.dtype, torch.dtype], equal: bool, tmp_path: Path
) -> None:
    """As a cold load compares them; bits which the model's dtype does not have do not count."""
    model = load(write_checkpoint(tmp_path / "a", 1))
    b = with_head(write_checkpoint(tmp_path / "b", 2), tmp_path / "heads", 0)
    tensors = load_file(b / "model.safetensors")
    value = tensors["lm_head.weight"].half().bfloat16()  # both hold it
    tensors["model.embed_tokens.weight"] = value.to(dtypes[0]) * (1 + 2**-12)
    tensors["lm_head.weight"] = value.to(dtypes[1]) + (0 if equal else 1)
    save_file(tensors, b / "model.safetensors", metadata={"format": "pt"})
    before, cold = out(model), load(b)

    with contextlib.nullcontext() if equal else pytest.raises(CheckpointError, match=r"lm_head.weight: .* the model ties"):
        reload_folder(model, b)
    assert torch.equal(out(model), out(cold) if equal else before)
    assert (cold.lm_head.weight is cold.model.embed_tokens.weight) == equal


def test_a_tied_head_of_another_shape_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    folder = with_head(write_checkpoint(tmp_path / "a", 1), tmp_path / "b", 0)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][1:].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(CheckpointError, match=r"lm_head\.weight: expected"):
        load(folder)


@pytest.mark.parametrize("change", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_folder_with_a_tied_head_is_what_serves_if_it_is_equal(dtype: torch.dtype, change: int, tmp_path: Path) -> None:
    """``verify --folder``: the model has one tensor for both names."""
    folder = with_head(write_checkpoint(tmp_path / "a", 1), tmp_path / "heads", change)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    serving = model_digest(load(tmp_path / "a"))

    assert (folder_digest(folder, served=serving["tensors"]) == serving) == (not change)
