"""Input scales in folders of weights alone: exporters leave them, nothing computes with them, and they travel along."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aliasparam import checkpoint_state_dict
from aliasparam_nvfp4.checkpoint import CheckpointError

transformers = pytest.importorskip("transformers")
pytest.importorskip("modelopt")
from aliasparam_nvfp4.integrations.transformers import reload_folder, use_backend  # noqa: E402

from .test_gpt_oss import folders as gpt_oss  # noqa: E402
from .test_transformers import IDS, same_bytes, write_checkpoint  # noqa: E402

INPUTS = {"gate_up_proj": 0.004, "down_proj": 0.006}


def written(kind: str, seed: int, path: Path, moe_folders: Callable[..., Path]) -> Path:
    """A folder of W4A4."""
    if kind == "linear layers":
        return write_checkpoint(path, seed)
    return moe_folders("qwen3", seed) if kind == "experts" else gpt_oss(path, seed, **INPUTS)[0]


def weights_alone(folder: Path, made: Path, value: float | None) -> Path:
    """Labelled so, with input scales of ``value``, or without."""
    made.mkdir()
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith("input_scale")]:
        given = tensors.pop(name)
        tensors |= {} if value is None else {name: torch.full_like(given, value)}
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    before = config["quantization_config"]
    config["quantization_config"] = {key: before[key] for key in ("quant_method", "ignore")} | {"quant_algo": "W4A16_NVFP4"}
    (made / "config.json").write_text(json.dumps(config))
    return made


def load(folder: Path) -> Any:
    with use_backend("reference", moe="reference"):
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def out(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["linear layers", "experts", "gpt-oss"])
def test_laws_5_and_9_scales_that_are_left_over_travel_along(kind: str, tmp_path: Path, moe_folders: Callable[..., Path]) -> None:
    """Also such as are none: the same for layers, for experts with tensors of their own and for fused ones."""
    a, b = (written(kind, seed, tmp_path / str(seed), moe_folders) for seed in (0, 1))
    first, second = weights_alone(a, tmp_path / "first", 0.0), weights_alone(b, tmp_path / "second", float("nan"))
    model, bare = load(first), load(weights_alone(a, tmp_path / "bare", None))
    assert torch.equal(out(model), out(bare))
    assert same_bytes(checkpoint_state_dict(model), load_file(first / "model.safetensors"))

    reload_folder(model, second)
    assert torch.equal(out(model), out(load(second)))
    assert same_bytes(checkpoint_state_dict(model), load_file(second / "model.safetensors"))
    with pytest.raises(CheckpointError, match="input_scale" if kind == "linear layers" else r"experts\..*input_scale"):
        reload_folder(bare, second)  # it has no place for them, and what it exports would be another folder
