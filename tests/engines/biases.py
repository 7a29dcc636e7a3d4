"""Models whose linear layers have biases, computed by transformers in float32 from the bytes of their folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..nvfp4.moe_models import exact
from .vllm.tiny import tiny_dense
from .w4a16 import as_w4a16

PROMPT = list(range(5, 25))


def biased(where: Path, seed: int) -> Path:
    """A Qwen2, whose q, k and v have biases; W4A16, because quantized activations make small differences large."""
    return as_w4a16(tiny_dense(where / "w4a4", seed), where / "w4a16", bare=True)


def near(found: Tensor, folder: Path, prompt: list[int]) -> bool:
    """Whether these are the log probabilities (f32 ``[V]``) of the token after the prompt; without the biases they are not."""
    model = exact(folder)
    wanted = after(model, prompt)
    for name, bias in model.named_parameters():
        if name.endswith("_proj.bias"):
            bias.data.zero_()
    plain = after(model, prompt)
    return bool((found - wanted).abs().max() < 0.3 < 3 < (plain - wanted).abs().max())


def after(model: torch.nn.Module, prompt: list[int]) -> Tensor:
    """Log probabilities of the token after the prompt, f32 ``[V]``."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)  # type: ignore[no-any-return]


def gpt_oss(folder: Path) -> Path:
    """A small gpt-oss, whose experts have biases, in NVFP4: its config, which is all that is read before experts are made."""
    from transformers import GptOssConfig

    config = GptOssConfig(
        num_hidden_layers=2, num_local_experts=4, vocab_size=64, hidden_size=128, intermediate_size=128, head_dim=64,
        num_attention_heads=2, num_key_value_heads=2, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    quantization = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head", "*self_attn*"]}
    fields = {**config.to_dict(), "architectures": ["GptOssForCausalLM"], "dtype": "bfloat16"}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**fields, "quantization_config": quantization}))
    save_file({"lm_head.weight": torch.zeros(64, 128)}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
