"""Folders that the real llm-compressor wrote (make_llmcompressor_folder.py), if ALIASPARAM_LLMCOMPRESSOR names where they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aliasparam import checkpoint_state_dict

pytest.importorskip("transformers")
from aliasparam_nvfp4.integrations.transformers import answer, load_model, logits, reload_folder

from .make_llmcompressor_folder import VARIANTS
from .test_moe_real import same_as_file

PROMPT = "What is the capital of France?"


def folder(variant: str, needed: str = "config.json") -> Path:
    root = os.environ.get("ALIASPARAM_LLMCOMPRESSOR")
    if not root or not (Path(root) / variant / needed).is_file():
        pytest.skip(f"ALIASPARAM_LLMCOMPRESSOR names no folder with {variant}")
    return Path(root) / variant


@pytest.mark.real
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_served_and_exported_byte_for_byte_and_reloads_into_itself(variant: str) -> None:
    path = folder(variant)
    model, tokenizer = load_model(path, "reference", moe_backend="reference")
    first = logits(model, tokenizer, PROMPT)

    assert "The capital of France is Paris" in answer(model, tokenizer, PROMPT)
    assert same_as_file(checkpoint_state_dict(model), path)
    reload_folder(model, path)
    assert torch.equal(logits(model, tokenizer, PROMPT), first)


@pytest.mark.real
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "dense"])
def test_its_experts_are_the_bytes_of_compressed_tensors_own_functions(variant: str) -> None:
    """So the small folders of moe_models.py, made by those functions, stand for llm-compressor's."""
    from .moe_models import packed_by_compressed_tensors

    files = load_file(folder(variant) / "model.safetensors")
    spelling = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    base = load_file(folder(f"{variant}.bf16", "model.safetensors") / "model.safetensors")
    experts = {n.removesuffix(".weight"): t for n, t in base.items() if ".layers.3." in n and ".experts." in n}
    assert experts
    named = {f"{n.rpartition('.')[0]}.{spelling.get(n.rpartition('.')[2], n.rpartition('.')[2])}": t for n, t in experts.items()}
    for name, tensor in packed_by_compressed_tensors(named, activations=True).items():
        assert torch.equal(files[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
