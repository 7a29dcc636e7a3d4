"""MoE models in transformers: Mixtral, Qwen2-MoE with its shared expert, Qwen3-MoE, from ModelOpt's own exports."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aliasparam import checkpoint_state_dict, process
from aliasparam.errors import StaleKernelError
from aliasparam_nvfp4.demo.run import addresses, fingerprints
from aliasparam_nvfp4.linear.verify import signal_to_noise
from aliasparam_nvfp4.moe import retarget_experts

transformers = pytest.importorskip("transformers")
pytest.importorskip("modelopt")
pytest.importorskip("compressed_tensors")
from aliasparam_nvfp4.integrations.transformers import compressed_tensors_here, reload_folder  # noqa: E402

from .moe_models import LEAST_DB, MODELS, by_compressed_tensors, by_modelopt, exact, load, logits  # noqa: E402
from .test_checkpoint_kinds import by_transformers_itself  # noqa: E402

KINDS = sorted(MODELS)


def same_bytes(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    raw = lambda t: t.contiguous().view(-1).view(torch.uint8)  # noqa: E731
    return a.keys() == b.keys() and all(a[n].shape == b[n].shape and torch.equal(raw(a[n]), raw(b[n])) for n in a)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_exact_arithmetic_on_the_files_bytes(kind: str, moe_folders: Callable[..., Path]) -> None:
    folder = moe_folders(kind)

    assert signal_to_noise(logits(load(folder, torch.float32)).double(), logits(exact(folder)).double()) >= LEAST_DB


@pytest.mark.parametrize("runner", ["reference", "flashinfer_cutlass", "flashinfer_trtllm_routed"])
@pytest.mark.parametrize("kind", KINDS)
def test_law_5_the_state_dict_is_the_file_by_name_and_byte(kind: str, runner: str, moe_folders: Callable[..., Path]) -> None:
    model, files = load(moe_folders(kind), runner=runner), load_file(moe_folders(kind) / "model.safetensors")

    assert same_bytes(checkpoint_state_dict(model), files)
    assert {n for n in model.state_dict() if n != "lm_head.weight"} == files.keys()
    assert len(dict(model.named_parameters())) == len(files)


@pytest.mark.parametrize("kind", KINDS)
def test_law_9_warm_equals_cold_and_back(kind: str, moe_folders: Callable[..., Path]) -> None:
    a, b = moe_folders(kind), moe_folders(kind, 1)
    model = load(a)
    first, where = logits(model), addresses(model)

    reload_folder(model, b)
    cold = load(b)
    assert torch.equal(logits(model), logits(cold))
    assert fingerprints(model) == fingerprints(cold)
    assert not torch.equal(logits(model), first)
    assert process(model) == 0
    assert same_bytes(checkpoint_state_dict(model), load_file(b / "model.safetensors"))

    reload_folder(model, a, chunk_bytes=100)
    assert torch.equal(logits(model), first)
    assert addresses(model) == where


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_written_by_save_pretrained_is_the_folder_that_was_read(
    kind: str, moe_folders: Callable[..., Path], tmp_path: Path
) -> None:
    model = load(moe_folders(kind))
    model.save_pretrained(tmp_path)

    assert same_bytes(load_file(tmp_path / "model.safetensors"), load_file(moe_folders(kind) / "model.safetensors"))
    assert torch.equal(logits(load(tmp_path)), logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_load_state_dict_takes_the_files_names(kind: str, moe_folders: Callable[..., Path]) -> None:
    model, cold = load(moe_folders(kind)), load(moe_folders(kind, 1))
    where = addresses(model)

    found = model.load_state_dict(load_file(moe_folders(kind, 1) / "model.safetensors"), strict=False)
    assert set(found.missing_keys) <= {"lm_head.weight"} and not found.unexpected_keys
    with pytest.raises(StaleKernelError):
        logits(model)
    process(model)

    assert torch.equal(logits(model), logits(cold))
    assert addresses(model) == where


def test_a_deep_copy_is_a_model_of_its_own_with_the_same_names(moe_folders: Callable[..., Path]) -> None:
    model = load(moe_folders("mixtral"))
    first, twin = logits(model), copy.deepcopy(model)

    reload_folder(model, moe_folders("mixtral", 1))

    assert torch.equal(logits(twin), first)
    assert same_bytes(checkpoint_state_dict(twin), load_file(moe_folders("mixtral") / "model.safetensors"))


def test_loaded_experts_move_to_another_runner_and_reload_there(moe_folders: Callable[..., Path]) -> None:
    model = load(moe_folders("qwen2"), runner="flashinfer_trtllm_routed")
    where = addresses(model)

    assert retarget_experts(model, "reference") == 2
    assert torch.equal(logits(model), logits(load(moe_folders("qwen2"))))
    reload_folder(model, moe_folders("qwen2", 1))

    assert torch.equal(logits(model), logits(load(moe_folders("qwen2", 1))))
    assert addresses(model) == where
    assert same_bytes(checkpoint_state_dict(model), load_file(moe_folders("qwen2", 1) / "model.safetensors"))


def test_both_spellings_of_mixtrals_experts_are_read_and_kept(moe_folders: Callable[..., Path], tmp_path: Path) -> None:
    """llm-compressor writes gate_proj, up_proj and down_proj where Mixtral has w1, w3 and w2."""
    folder = Path(shutil.copytree(moe_folders("mixtral"), tmp_path / "spelled"))
    spelled = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for old, new in {".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}.items():
            name = name.replace(old, new)
        spelled[name] = tensor
    save_file(spelled, folder / "model.safetensors", metadata={"format": "pt"})

    model, other = load(folder), load(moe_folders("mixtral"))

    assert torch.equal(logits(model), logits(other))
    assert same_bytes(checkpoint_state_dict(model), spelled)
    reload_folder(model, moe_folders("mixtral", 1))  # the names stay those of the first folder
    reload_folder(other, folder)
    assert torch.equal(logits(model), logits(load(moe_folders("mixtral", 1))))
    assert checkpoint_state_dict(model).keys() == spelled.keys()


def test_experts_that_are_not_quantized_stay_transformers_own_and_show_the_files_names(tmp_path: Path) -> None:
    exclude = ("*layers.1.*experts*",)
    a, b = (by_modelopt(tmp_path / str(seed), "qwen3", seed, exclude) for seed in (0, 1))
    model = load(a)
    first = logits(model)

    assert type(model.model.layers[0].mlp.experts).__name__ == "Experts"
    assert type(model.model.layers[1].mlp.experts).__name__ == "Qwen3MoeExperts"
    assert same_bytes(checkpoint_state_dict(model), load_file(a / "model.safetensors"))
    assert signal_to_noise(logits(load(a, torch.float32)).double(), logits(exact(a)).double()) >= LEAST_DB
    reload_folder(model, b)
    assert torch.equal(logits(model), logits(load(b)))
    reload_folder(model, a)
    assert torch.equal(logits(model), first)


# -- compressed-tensors, and weights alone -------------------------------------------------------------------------------


def load_here(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    with compressed_tensors_here():
        return load(folder, dtype)


@pytest.mark.parametrize("kind, activations", [("mixtral", True), ("qwen2", True), ("qwen3", True), ("qwen3", False)])
def test_compressed_tensors_experts_load_right_export_byte_for_byte_and_reload(
    kind: str, activations: bool, tmp_path: Path
) -> None:
    a, b = (by_compressed_tensors(tmp_path / str(seed), kind, seed, activations=activations) for seed in (0, 1))
    model = load_here(a)
    first = logits(model)

    # Where activations are not quantized there are no edges between codes.
    least = LEAST_DB if activations else 60.0
    assert signal_to_noise(logits(load_here(a, torch.float32)).double(), logits(exact(a)).double()) >= least
    assert same_bytes(checkpoint_state_dict(model), load_file(a / "model.safetensors"))
    reload_folder(model, b)
    assert torch.equal(logits(model), logits(load_here(b)))
    reload_folder(model, a)
    assert torch.equal(logits(model), first)


def test_transformers_own_loading_of_them_is_silently_wrong_and_ours_right(tmp_path: Path) -> None:
    """huggingface/transformers issue 48371: block scales are applied to experts, and their global scale is not."""
    folder = by_compressed_tensors(tmp_path / "a", "qwen3", activations=False)
    theirs = by_transformers_itself(folder)
    right = exact(folder)
    files = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.3"
    weight = theirs.model.layers[0].mlp.experts.gate_up_proj[3].chunk(2)[0].detach().double()
    ratio = weight / right.model.layers[0].mlp.experts.weights["3.gate_proj.weight"].double()

    if torch.allclose(ratio[ratio.isfinite()], torch.ones(()).double(), rtol=1e-2):
        pytest.skip("this transformers has been repaired")
    total = files[f"{name}.gate_proj.weight_global_scale"].double()
    assert torch.allclose(ratio[ratio.isfinite()], total, rtol=1e-2), "larger by exactly the global scale"
    assert signal_to_noise(logits(theirs).double(), logits(right).double()) < 3
    assert signal_to_noise(logits(load_here(folder, torch.float32)).double(), logits(right).double()) >= 60


def test_modelopts_experts_with_weights_alone_quantized(tmp_path: Path) -> None:
    folder = by_modelopt(tmp_path / "a", "qwen3", recipe="W4A16_NVFP4_CFG")

    assert signal_to_noise(logits(load(folder, torch.float32)).double(), logits(exact(folder)).double()) >= 60
    assert same_bytes(checkpoint_state_dict(load(folder)), load_file(folder / "model.safetensors"))
