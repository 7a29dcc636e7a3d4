"""Tiny models of the classes that are published in NVFP4, and folders of them as their exporters name things."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aliasparam_nvfp4.quantize.codec import dequantize, quantize

IDS = torch.arange(2, 26).view(2, 12)
_SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2, "tie_word_embeddings": False,
}  # fmt: skip
_LATENT: dict[str, Any] = {
    **{k: v for k, v in _SMALL.items() if k != "head_dim"}, "num_key_value_heads": 4, "moe_intermediate_size": 32,
    "n_routed_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 32,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
_NEXT: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip


def _qwen3_next(t: Any) -> Any:
    experts = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    return t.Qwen3NextForCausalLM(t.Qwen3NextConfig(**_SMALL, **_NEXT, **experts))


def _qwen3_5(t: Any) -> Any:
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
              "num_position_embeddings": 16, "deepstack_visual_indexes": []}  # fmt: skip
    config = t.Qwen3_5Config(text_config={**_SMALL, **_NEXT}, vision_config=vision, tie_word_embeddings=False)
    return t.Qwen3_5ForConditionalGeneration(config)


def _kimi(t: Any) -> Any:
    text = {**_LATENT, "model_type": "deepseek_v3"}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return t.Kimi_K25ForConditionalGeneration(t.Kimi_K25Config(tie_word_embeddings=False, text_config=text, vision_config=vision))


def _deepseek(t: Any) -> Any:
    return t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**_LATENT, num_nextn_predict_layers=1))


def _glm(t: Any) -> Any:
    experts = {"moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1,
               "topk_group": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1}  # fmt: skip
    return t.Glm4MoeForCausalLM(t.Glm4MoeConfig(**_SMALL, **experts))


def _nemotron(t: Any) -> Any:
    own = {k: v for k, v in _SMALL.items() if k != "num_hidden_layers"}
    return t.NemotronHForCausalLM(t.NemotronHConfig(
        **own, num_hidden_layers=3, layers_block_type=["mamba", "moe", "attention"], mamba_num_heads=4, mamba_head_dim=16,
        ssm_state_size=16, n_groups=1, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, n_group=1,
        topk_group=1,
        moe_shared_expert_intermediate_size=64, use_mamba_kernels=False, chunk_size=8, num_logits_to_keep=1,
    ))  # fmt: skip


def _minimax(t: Any) -> Any:
    return t.MiniMaxM2ForCausalLM(
        t.MiniMaxM2Config(**{**_SMALL, "intermediate_size": 32}, num_local_experts=4, num_experts_per_tok=2)
    )


def _gemma4(t: Any) -> Any:
    config = t.Gemma4TextConfig(
        **_SMALL, global_head_dim=16, layer_types=["sliding_attention", "full_attention"], hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=64, num_kv_shared_layers=0, sliding_window=8, enable_moe_block=True, num_experts=4,
        top_k_experts=2, moe_intermediate_size=32,
    )  # fmt: skip
    return t.Gemma4ForCausalLM(config)


#: Model class to (maker, file names of what is added to its folder and dropped at load).
MODELS: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "Qwen3-Next": (_qwen3_next, ("mtp.fc.weight", "mtp.layers.0.mlp.experts.0.up_proj.weight")),
    "Qwen3.5": (_qwen3_5, ("mtp.fc.weight",)),
    "Kimi-K2.5": (_kimi, ()),
    "DeepSeek-V3": (_deepseek, ("model.layers.2.eh_proj.weight", "model.layers.2.mlp.experts.0.up_proj.weight")),
    "GLM-4.5": (_glm, ("model.layers.2.eh_proj.weight", "model.layers.2.shared_head.norm.weight")),
    "Nemotron-H": (_nemotron, ("mtp.layers.0.norm.weight",)),
    "MiniMax-M2": (_minimax, ()),
    "Gemma-4": (_gemma4, ()),
}


def saved(kind: str, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Any], type[Any]]:
    """(tensors under the names of files, config.json, class) of a tiny model in bf16, as transformers itself saves it."""
    import transformers

    torch.manual_seed(seed)
    model = MODELS[kind][0](transformers).to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = load_file(f"{folder}/model.safetensors")
        config = json.loads(Path(folder, "config.json").read_text())
    if kind == "Kimi-K2.5":  # transformers' way back is not the published files' spelling
        tensors = {name.replace("language_model.model.blocks.", "language_model.model.layers."): t for name, t in tensors.items()}
    if kind == "Gemma-4":  # fused in transformers' own files; quantized experts are apart in everybody's
        tensors = {n: t for name, whole in tensors.items() for n, t in _without_overlap(name, whole).items()}
    return tensors, config, type(model)


def _without_overlap(name: str, whole: Tensor) -> dict[str, Tensor]:
    head, _, leaf = name.rpartition(".experts.")
    if not head:
        return {name: whole}
    found = {}
    for number, tensor in enumerate(whole):
        parts = dict(zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True)) if leaf == "gate_up_proj" else {leaf: tensor}
        found |= {f"{head}.experts.{number}.{part}.weight": value.contiguous() for part, value in parts.items()}
    return found


def is_quantized(module: str) -> bool:
    """The projections of MLPs and experts, as published checkpoints have them."""
    text = "visual" not in module and "vision" not in module and "mm_projector" not in module
    leaf = module.rpartition(".")[2]
    return (
        text
        and ("mlp" in module or "experts" in module or "moe" in module)
        and (leaf.endswith("_proj") or leaf in ("w1", "w2", "w3"))
    )


def quantized(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(ModelOpt's W4A16_NVFP4 tensors, decoded ones in float32). Siblings share a global scale, as exporters unify them."""
    packed: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or tensor.dim() != 2 or not is_quantized(module):
            packed[name], plain[name] = tensor, tensor.float() if tensor.is_floating_point() else tensor
            continue
        total = torch.tensor(3.0 / 2688)
        codes, scales, total = quantize(tensor.float(), total)
        packed |= {name: codes, f"{module}.weight_scale": scales, f"{module}.weight_scale_2": total.reshape(())}
        plain[name] = dequantize(codes, scales, total)
    return packed, plain


def write(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
