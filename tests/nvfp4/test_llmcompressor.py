"""Folders that the real llm-compressor wrote (make_llmcompressor_folder.py), if ALIASPARAM_LLMCOMPRESSOR names where they are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from aliasparam import checkpoint_state_dict
from aliasparam_nvfp4.linear.verify import signal_to_noise

transformers = pytest.importorskip("transformers")
from aliasparam_nvfp4.integrations.transformers import Experts, answer, load_model, logits, reload_folder  # noqa: E402

from .moe_models import exact, packed_by_compressed_tensors  # noqa: E402
from .test_moe_real import same_as_file  # noqa: E402

ROOT = Path(os.environ.get("ALIASPARAM_LLMCOMPRESSOR", "/nonexistent"))
FOLDERS = sorted(p.parent for p in ROOT.glob("*/config.json") if "quantization_config" in json.loads(p.read_text()))
PROMPT = "What is the capital of France?"
pytestmark = [pytest.mark.real, pytest.mark.skipif(not FOLDERS, reason="ALIASPARAM_LLMCOMPRESSOR names no folder of them")]


def is_dense(folder: Path) -> bool:
    return folder.name.startswith("dense")


def quantizes_activations(folder: Path) -> bool:
    group = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    return group["input_activations"] is not None


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_it_is_served_and_exported_byte_for_byte_and_reloads_into_itself(folder: Path) -> None:
    model, tokenizer = load_model(folder, "reference", moe_backend="reference")
    first = logits(model, tokenizer, PROMPT)

    # Its input scales for the experts are from fewer tokens than ModelOpt's, and this small model does not take the clipping.
    if is_dense(folder) or not quantizes_activations(folder):
        assert "The capital of France is Paris" in answer(model, tokenizer, PROMPT)
    assert same_as_file(checkpoint_state_dict(model), folder)
    reload_folder(model, folder)
    assert torch.equal(logits(model, tokenizer, PROMPT), first)


@pytest.mark.parametrize("folder", [f for f in FOLDERS if is_dense(f)], ids=lambda p: p.name)
def test_projections_fuse_because_their_global_scales_were_unified(folder: Path) -> None:
    model, _ = load_model(folder, "reference")
    for layer in model.model.layers:
        assert layer.self_attn.qkv_proj.partitions == (576, 192, 192)
        assert layer.mlp.gate_up_proj.partitions == (1536, 1536)
        assert layer.self_attn.qkv_proj.quant_method.input_scale is quantizes_activations(folder)


@pytest.mark.parametrize("folder", [f for f in FOLDERS if not is_dense(f)], ids=lambda p: p.name)
def test_each_layers_experts_give_what_exact_arithmetic_on_its_bytes_gives(folder: Path) -> None:
    model, tokenizer = load_model(folder, "reference", moe_backend="reference")
    right = exact(folder)
    seen: dict[str, tuple[tuple[Any, ...], Tensor]] = {}
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            module.register_forward_hook(lambda _, args, out, path=path: seen.update({path: (args, out)}))
    logits(model, tokenizer, PROMPT)

    assert len(seen) == model.config.num_hidden_layers
    for path, ((hidden, ids, weights), found) in list(seen.items())[::7]:
        expected = right.get_submodule(path)(hidden.float(), ids, weights.float())
        assert signal_to_noise(found.double(), expected.double()) >= 25, path  # found is bfloat16


@pytest.mark.parametrize("folder", [f for f in FOLDERS if (ROOT / f"{f.name}.bf16").is_dir()], ids=lambda p: p.name)
def test_its_experts_are_the_bytes_of_compressed_tensors_own_functions(folder: Path) -> None:
    """So the small folders of moe_models.py, made by those functions, stand for llm-compressor's."""
    files = load_file(folder / "model.safetensors")
    spelling = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    base = load_file(ROOT / f"{folder.name}.bf16" / "model.safetensors")
    experts = {n.removesuffix(".weight"): t for n, t in base.items() if ".layers.3." in n and ".experts." in n}
    assert experts
    named = {f"{n.rpartition('.')[0]}.{spelling.get(n.rpartition('.')[2], n.rpartition('.')[2])}": t for n, t in experts.items()}
    for name, tensor in packed_by_compressed_tensors(named, activations=quantizes_activations(folder)).items():
        assert torch.equal(files[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
