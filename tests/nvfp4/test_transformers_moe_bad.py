"""Folders and arguments that do not fit MoE models in transformers: one clear error, and the old weights serve."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aliasparam.errors import AliasError
from aliasparam_nvfp4.checkpoint import CheckpointError, UnsupportedFormatError
from aliasparam_nvfp4.demo.run import fingerprints
from aliasparam_nvfp4.errors import BackendError, ScaleError
from aliasparam_nvfp4.linear.verify import signal_to_noise

transformers = pytest.importorskip("transformers")
pytest.importorskip("modelopt")
pytest.importorskip("compressed_tensors")
from aliasparam_nvfp4.integrations.transformers import load_model, reload_folder  # noqa: E402

from .moe_models import LEAST_DB, exact, load, logits  # noqa: E402

# -- what does not fit ---------------------------------------------------------------------------------------------------

EXPERT = "model.layers.1.block_sparse_moe.experts.2"


def edit(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def drop_expert(tensors: dict[str, Tensor]) -> None:
    for name in [n for n in tensors if n.startswith(f"{EXPERT}.")]:
        del tensors[name]


BAD: dict[str, tuple[Callable[[Path], None], type[AliasError], str]] = {
    "a truncated file": (truncate, CheckpointError, "truncated"),
    "a missing expert": (edit(drop_expert), CheckpointError, "expert 2 is missing"),
    "a missing tensor": (edit(lambda t: t.pop(f"{EXPERT}.w3.input_scale")), CheckpointError, "expert 2 lacks w3 input_scale"),
    "an expert too many": (
        edit(lambda t: t.update({f"{EXPERT[:-1]}4.w1.weight": t[f"{EXPERT}.w1.weight"].clone()})), CheckpointError,
        "expert 4 is unexpected"),
    "an expert twice": (
        edit(lambda t: t.update({f"{EXPERT}.up_proj.weight": t[f"{EXPERT}.w3.weight"].clone()})), CheckpointError, "twice"),
    "mixed dtypes": (
        edit(lambda t: t.update({f"{EXPERT}.w2.weight": torch.ones(64, 96, dtype=torch.bfloat16)})), CheckpointError,
        "different dtypes of w2 weight"),
    "a wrong shape": (
        edit(lambda t: t.update({f"{EXPERT}.w2.weight": t[f"{EXPERT}.w2.weight"][:, :-1].contiguous()})), CheckpointError,
        f"{EXPERT}.w2.weight: expected"),
    "another router": (
        edit(lambda t: t.pop("model.layers.0.block_sparse_moe.gate.weight")), CheckpointError,
        "missing: model.layers.0.block_sparse_moe.gate.weight"),
    "a scale that is none": (edit(lambda t: t[f"{EXPERT}.w1.weight_scale_2"].fill_(0)), ScaleError, "not a scale"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_law_10_a_bad_folder_is_one_clear_error_warm_and_cold(
    case: str, moe_folders: Callable[..., Path], tmp_path: Path
) -> None:
    poison, kind, message = BAD[case]
    model = load(moe_folders("mixtral"))
    first, held = logits(model), fingerprints(model)
    bad = Path(shutil.copytree(moe_folders("mixtral", 1), tmp_path / "bad"))
    poison(bad)

    with pytest.raises(kind) as error:
        reload_folder(model, bad)

    assert message in str(error.value)
    assert torch.equal(logits(model), first)
    assert fingerprints(model) == held
    with pytest.raises((kind, OSError)):
        load(bad)


def test_gate_and_up_scales_that_differ_are_refused_by_a_runner_with_one_factor(
    moe_folders: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(moe_folders("mixtral"), tmp_path / "untied"))
    edit(lambda t: t[f"{EXPERT}.w1.weight_scale_2"].mul_(1.5))(folder)
    model = load(moe_folders("mixtral"), runner="flashinfer_cutlass")
    held = fingerprints(model)

    with pytest.raises(ScaleError, match="one factor"):
        reload_folder(model, folder)

    assert fingerprints(model) == held
    assert signal_to_noise(logits(load(folder, torch.float32)).double(), logits(exact(folder)).double()) >= LEAST_DB


def test_an_unknown_runner_is_refused_and_a_known_one_without_its_gpu_at_the_forward(moe_folders: Callable[..., Path]) -> None:
    with pytest.raises(BackendError, match="unknown MoE runner"):
        load_model(moe_folders("qwen3"), "reference", moe_backend="cutlas")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="cannot run here"):
            logits(load(moe_folders("qwen3"), runner="flashinfer_cutlass"))


def config(folder: Path, **entries: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize("kind", ["qwen3", "mixtral"])
def test_law_9_experts_that_a_cold_load_would_serve_otherwise_are_refused_by_a_reload(
    kind: str, moe_folders: Callable[..., Path], tmp_path: Path
) -> None:
    """The same tensors, of which another label says that experts' activations are left as they are, or one is not quantized."""
    other = Path(shutil.copytree(moe_folders(kind, 1), tmp_path / "other"))
    said = json.loads((other / "config.json").read_text())["quantization_config"]
    modules = [n.rpartition(".")[0] for n in load_file(other / "model.safetensors") if n.endswith(".weight_scale_2")]
    each = {name: {"quant_algo": "W4A16_NVFP4" if ".experts." in name else "NVFP4"} for name in modules}
    alone = {**said, "quant_algo": "MIXED_PRECISION", "quantized_layers": each}
    part = {**said, "ignore": [*said["ignore"], *(name for name in modules if ".experts.3." in name)]}
    model = load(moe_folders(kind))
    held = fingerprints(model)

    for quantization in (alone, part):
        config(other, quantization_config=quantization)
        with pytest.raises(CheckpointError, match="quantized in another way"):
            reload_folder(model, other)
        assert fingerprints(model) == held


def test_experts_with_another_activation_or_quantized_in_part_are_refused_by_name(
    moe_folders: Callable[..., Path], tmp_path: Path
) -> None:
    gelu = Path(shutil.copytree(moe_folders("qwen3"), tmp_path / "gelu"))
    config(gelu, hidden_act="gelu")
    part = Path(shutil.copytree(moe_folders("qwen3"), tmp_path / "part"))
    quantization = json.loads((part / "config.json").read_text())["quantization_config"]
    config(part, quantization_config={**quantization, "ignore": [*quantization["ignore"], "*.experts.3.up_proj"]})

    for folder in (gelu, part):
        with pytest.raises(UnsupportedFormatError, match=r"model\.layers\.0\.mlp\.experts"):
            load(folder)
