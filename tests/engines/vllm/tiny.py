"""Tiny models that vLLM's CPU kernels take (heads of 64), as NVFP4 folders without a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_COMMON: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "tie_word_embeddings": False, "dtype": "bfloat16", "initializer_range": 0.2, "max_position_embeddings": 256,
}  # fmt: skip


def tiny_moe(folder: Path, seed: int, experts: int = 8) -> Path:
    """Qwen3-MoE; experts of 96 neurons, which TRT-LLM's layout pads."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(**_COMMON, moe_intermediate_size=96, num_experts=experts, num_experts_per_tok=2, norm_topk_prob=True)
    return _written(folder, Qwen3MoeForCausalLM, config, seed)


def tiny_dense(folder: Path, seed: int, *, tied: bool = False) -> Path:
    """Qwen2: q, k and v with biases, and with different global scales, as exporters leave them that do not unify. ``tied``: the
    embedding is the head."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = {name: value for name, value in _COMMON.items() if name != "head_dim"} | {"num_attention_heads": 2}
    shape |= {"num_key_value_heads": 2, "tie_word_embeddings": tied}
    config = Qwen2Config(**shape, intermediate_size=160)
    return _written(folder, Qwen2ForCausalLM, config, seed, apart=True)


def tiny_compressed(folder: Path, seed: int) -> Path:
    """Qwen3-MoE by compressed-tensors' own packing, with the names and the config of llm-compressor."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from ...nvfp4.moe_models import packed_by_compressed_tensors

    config = Qwen3MoeConfig(**_COMMON, moe_intermediate_size=96, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True)
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    plain, linears = {}, {}
    for name, tensor in model.state_dict().items():
        prefix = name.rpartition(".")[0]
        if name.endswith("experts.gate_up_proj"):
            for expert, weight in enumerate(tensor):
                linears[f"{prefix}.{expert}.gate_proj"], linears[f"{prefix}.{expert}.up_proj"] = weight.chunk(2)
        elif name.endswith("experts.down_proj"):
            linears |= {f"{prefix}.{expert}.down_proj": weight for expert, weight in enumerate(tensor)}
        elif name.endswith("_proj.weight"):
            linears[prefix] = tensor
        else:
            plain[name] = tensor
    tensors = plain | packed_by_compressed_tensors(linears, activations=True)
    tensors |= {f"{name}.input_global_scale": torch.tensor([90.0]) for name in linears}
    folder.mkdir(parents=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True, "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {**weights, "dynamic": "local"}}
    quantization = {
        "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": {"format": "nvfp4-pack-quantized", **group}},
        "ignore": ["lm_head", *(name.rpartition(".")[0] for name in plain if name.endswith("mlp.gate.weight"))],
    }  # fmt: skip
    fields = {**config.to_dict(), "architectures": ["Qwen3MoeForCausalLM"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps({**fields, "quantization_config": quantization}))
    return folder


def tiny_plain(folder: Path, seed: int, *, tied: bool = False) -> Path:
    """Qwen2 in bf16, not quantized."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = {name: value for name, value in _COMMON.items() if name != "head_dim"}
    torch.manual_seed(seed)
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    config = Qwen2Config(**shape, intermediate_size=160)
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    folder.mkdir(parents=True)
    save_file({n: p.detach() for n, p in model.named_parameters()}, folder / "model.safetensors", metadata={"format": "pt"})
    fields = {**config.to_dict(), "architectures": ["Qwen2ForCausalLM"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def twins(folder: Path, seed: int) -> Path:
    """The same in NVFP4 but for one down projection in bf16, which both layers of a model called Twins share."""
    tiny_dense(folder, seed)
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if ".down_proj." not in n}
    torch.manual_seed(seed)
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.randn(128, 160, dtype=torch.bfloat16) / 5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text()) | {"architectures": ["Twins"]}
    fields["quantization_config"]["ignore"] += [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def _written(folder: Path, kind: Any, config: Any, seed: int, *, apart: bool = False) -> Path:
    from aliasparam_nvfp4.demo.export import nvfp4_tensors

    torch.manual_seed(seed)
    model = kind(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("mlp.gate.weight", "bias")):
            parameter.data.normal_(0, 0.5)
    model.to(torch.bfloat16).eval()
    with torch.no_grad():
        tensors = nvfp4_tensors(model, [torch.arange(1, 25).view(2, 12)])
    if apart:  # as if each had been quantized alone: the same weights up to rounding of block scales
        for name in list(tensors):
            if name.endswith(("k_proj.weight_scale_2", "v_proj.weight_scale_2")):
                tensors[name] = tensors[name] * (0.8 if "k_proj" in name else 0.3)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ignored = ["lm_head", *{n.rpartition(".")[0] for n in tensors if n.endswith(".gate.weight")}]
    quantization = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ignored}
    fields = {**config.to_dict(), "architectures": [kind.__name__], "dtype": "bfloat16", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder
