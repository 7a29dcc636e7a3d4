"""Small NVFP4 folders with a tokenizer and a chat template, which never stop before they are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..test_cli import write_tokenizer
from ..test_transformers import write_checkpoint

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def chat_folder(folder: Path, seed: int) -> Path:
    write_checkpoint(folder, seed)
    write_tokenizer(folder)
    edit(folder / "tokenizer_config.json", chat_template=TEMPLATE)
    edit(folder / "config.json", eos_token_id=None)
    (folder / "generation_config.json").write_text(json.dumps({"suppress_tokens": [0]}))  # the unknown word has no text
    file = folder / "model.safetensors"
    wandering = torch.randn(48, generator=torch.Generator().manual_seed(seed)) * 3  # or each token is answered by itself
    save_file(load_file(file) | {"model.norm.weight": wandering.to(torch.bfloat16)}, file, metadata={"format": "pt"})
    return folder


def edit(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
