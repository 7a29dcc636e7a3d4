"""Folders of W4A16 from folders of W4A4."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file


def as_w4a16(folder: Path, to: Path, *, bare: bool = False) -> Path:
    """The same weights, whose exporter left the input scales in; ``bare``: it did not."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    config["quantization_config"]["quant_algo"] = "W4A16_NVFP4"
    (to / "config.json").write_text(json.dumps(config))
    tensors = load_file(to / "model.safetensors")
    left = [name for name in tensors if name.endswith("input_scale")]
    assert left
    if bare:
        kept = {name: tensor for name, tensor in tensors.items() if name not in left}
        save_file(kept, to / "model.safetensors", metadata={"format": "pt"})
    return to
