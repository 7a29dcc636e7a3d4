"""LoRA adapters in PEFT's form, and transformers' model in float32 with one merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..nvfp4.moe_models import exact

RANK = 8
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def adapter(base: Path, where: Path) -> Path:
    """Of every projection of the model at ``base``."""
    torch.manual_seed(5)
    tensors, targets = {}, set()
    for name, module in exact(base).named_modules():
        if isinstance(module, nn.Linear) and name.endswith("_proj"):
            tensors[f"{_PREFIX}{name}{_A}"] = torch.randn(RANK, module.in_features) / 10
            tensors[f"{_PREFIX}{name}{_B}"] = torch.randn(module.out_features, RANK) / 10
            targets.add(name.rpartition(".")[2])
    where.mkdir()
    save_file(tensors, where / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": sorted(targets), "bias": "none"}
    (where / "adapter_config.json").write_text(json.dumps({**fields, "base_model_name_or_path": str(base)}))
    return where


def merged(base: Path, where: Path) -> Any:
    model, tensors = exact(base), load_file(where / "adapter_model.safetensors")
    for name, first in tensors.items():
        if name.endswith(_A):
            module = model.get_submodule(name.removeprefix(_PREFIX).removesuffix(_A))
            module.weight.data += 2 * tensors[name.replace(_A, _B)] @ first
    return model
