"""Small MoE models, and NVFP4 folders of them made by ModelOpt and by compressed-tensors' own functions."""

from __future__ import annotations

import copy
import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aliasparam_nvfp4.demo._quiet import quiet
from aliasparam_nvfp4.quantize.codec import dequantize, quantize_activation

#: As for dense models (test_checkpoint_kinds.py): an activation on the edge between two codes may fall to the other side.
LEAST_DB = 10.0
IDS = torch.arange(1, 25).view(2, 12)
_COMMON: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "tie_word_embeddings": True, "dtype": "bfloat16", "initializer_range": 0.2,
}  # fmt: skip


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**_COMMON, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2))


def qwen2() -> Any:
    """With a shared expert and biases of q, k and v."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **_COMMON, moe_intermediate_size=48, shared_expert_intermediate_size=80, num_experts=4, num_experts_per_tok=2
        )
    )


def qwen3() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**_COMMON, moe_intermediate_size=128, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True)
    )


MODELS: dict[str, Callable[[], Any]] = {"mixtral": mixtral, "qwen2": qwen2, "qwen3": qwen3}


def small_moe(kind: str, seed: int = 0) -> Any:
    """The model in bf16, with a router that is not shy."""
    torch.manual_seed(seed)
    model = MODELS[kind]()
    model.config.architectures = [type(model).__name__]
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.data.normal_(0, 0.5)
    return model.to(torch.bfloat16).eval()


def by_modelopt(folder: Path, kind: str, seed: int = 0, exclude: tuple[str, ...] = (), recipe: str = "NVFP4_DEFAULT_CFG") -> Path:
    """ModelOpt's own quantization and export."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with quiet():
            import modelopt.torch.quantization as mtq
            from modelopt.torch.export import export_hf_checkpoint

            config = copy.deepcopy(getattr(mtq, recipe))
            config["quant_cfg"] = [*config["quant_cfg"], *({"quantizer_name": name, "enable": False} for name in exclude)]
            model = mtq.quantize(small_moe(kind, seed), config, lambda m: m(input_ids=IDS))
            with torch.inference_mode():
                export_hf_checkpoint(model, export_dir=folder)
    return folder


def packed_by_compressed_tensors(linears: dict[str, Tensor], *, activations: bool) -> dict[str, Tensor]:
    """Tensors of the files for weights by module, without input scales. q, k and v share a global scale, and gate and up."""
    from compressed_tensors.compressors import NVFP4PackedCompressor
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scheme = preset_name_to_scheme("NVFP4" if activations else "NVFP4A16", ["Linear"])
    groups = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
    group = lambda n: n.rpartition(".")[0] + groups.get(n.rpartition(".")[2], n)  # noqa: E731
    largest: dict[str, Tensor] = {}
    for name, weight in linears.items():
        largest[group(name)] = torch.maximum(largest.get(group(name), torch.zeros((), dtype=weight.dtype)), weight.abs().max())
    tensors: dict[str, Tensor] = {}
    for name, weight in linears.items():
        total = generate_gparam(-largest[group(name)], largest[group(name)])
        blocks = weight.reshape(weight.shape[0], -1, 16)
        scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights, global_scale=total)
        raw = {"weight": weight.contiguous(), "weight_scale": scale, "weight_global_scale": total}
        tensors |= {f"{name}.{n}": t for n, t in NVFP4PackedCompressor.compress(raw, scheme).items()}
        tensors[f"{name}.weight_global_scale"] = total.float().reshape(1)
    return tensors


def by_compressed_tensors(folder: Path, kind: str, seed: int = 0, *, activations: bool = True) -> Path:
    """compressed-tensors' own parameters and packing, with llm-compressor's names and config.

    As llm-compressor 0.14.0.1 writes (make_llmcompressor_folder.py): projections apart, in Mixtral too as gate_proj,
    up_proj and down_proj; gate and up of an expert with one global scale; every router ignored by its full name.
    """
    from safetensors.torch import save_file

    model = small_moe(kind, seed)
    plain, linears, routers = {}, {}, []
    for name, tensor in model.state_dict().items():
        name = name.replace(".mlp.", ".block_sparse_moe.") if kind == "mixtral" else name
        prefix = name.rpartition(".")[0]
        if name.endswith("experts.gate_up_proj"):
            for expert, weight in enumerate(tensor):
                linears[f"{prefix}.{expert}.gate_proj"], linears[f"{prefix}.{expert}.up_proj"] = weight.chunk(2)
        elif name.endswith("experts.down_proj"):
            linears |= {f"{prefix}.{expert}.down_proj": weight for expert, weight in enumerate(tensor)}
        elif name.endswith("_proj.weight"):
            linears[prefix] = tensor
        elif name != "lm_head.weight":
            plain[name] = tensor
        if prefix.endswith((".gate", "_gate")):
            routers.append(prefix)
    tensors = plain | packed_by_compressed_tensors(linears, activations=activations)
    if activations:
        for name in linears:
            expert = int(name.split(".experts.")[1].split(".")[0]) if ".experts." in name else 0
            tensors[f"{name}.input_global_scale"] = torch.tensor([60.0 + 8 * expert if "down" in name else 90.0])
    folder.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True, "dynamic": False}
    quantization = {
        "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "format": "nvfp4-pack-quantized", "targets": ["Linear"], "weights": weights,
                "input_activations": {**weights, "dynamic": "local"} if activations else None,
            },
        },
        "ignore": ["lm_head", *dict.fromkeys(routers)],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**model.config.to_dict(), "quantization_config": quantization}))
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.float()  # type: ignore[no-any-return]


INPUT = ("input_scale", "input_global_scale")
#: Files' spellings to one.
_SPELLING = {".block_sparse_moe.": ".mlp.", ".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}


def exact(folder: Path) -> Any:
    """transformers' own model in float32 from the folder's bytes: weights decoded, activations quantized by the file's scales.

    Written for ModelOpt's and compressed-tensors' files without a line of the library's loading code.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    files = {_spelled(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = {name: tensor.float() for name, tensor in files.items() if tensor.dtype is torch.bfloat16}
    for name in [n for n, t in files.items() if t.dtype is torch.uint8]:
        module = name.rpartition(".")[0]
        state[f"{module}.weight"] = dequantize(files[name], files[f"{module}.weight_scale"], _multiplier(files, module, "weight"))
    scales = {n.rpartition(".")[0]: _multiplier(files, n.rpartition(".")[0], "input") for n in files if n.endswith(INPUT)}
    for path, module in list(model.named_modules()):
        if path.endswith(".experts"):
            weights = {n.removeprefix(f"{path}."): state.pop(n) for n in list(state) if n.startswith(f"{path}.")}
            inputs = {n.removeprefix(f"{path}."): s for n, s in scales.items() if n.startswith(f"{path}.")}
            model.set_submodule(path, _Exact(weights, inputs))
        elif path in scales:
            module.register_forward_pre_hook(lambda _, args, scale=scales[path]: (quantized(args[0], scale),))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    return model


def _spelled(name: str) -> str:
    for old, new in _SPELLING.items():
        name = name.replace(old, new)
    return name


def _multiplier(files: dict[str, Tensor], module: str, which: str) -> Tensor:
    ours, theirs = {"weight": ("weight_scale_2", "weight_global_scale"), "input": ("input_scale", "input_global_scale")}[which]
    if f"{module}.{ours}" in files:
        return files[f"{module}.{ours}"]
    return 1 / files[f"{module}.{theirs}"].reshape(())


def quantized(x: Tensor, scale: Tensor) -> Tensor:
    codes, blocks = quantize_activation(x, (1 / scale).reshape(1))
    return dequantize(codes, blocks, scale)


class _Exact(nn.Module):
    """Experts one by one; where there are input scales, the largest of the layer quantizes activations for all."""

    def __init__(self, weights: dict[str, Tensor], scales: dict[str, Tensor]) -> None:
        super().__init__()
        self.weights = weights
        largest = lambda *ends: max(s for n, s in scales.items() if n.endswith(ends))  # noqa: E731
        self.scales = (largest("gate_proj", "up_proj"), largest("down_proj")) if scales else None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        rows = quantized(hidden_states, self.scales[0]) if self.scales else hidden_states
        for token, choice in itertools.product(range(len(rows)), range(top_k_index.shape[1])):
            gate, up, down = (
                self.weights[f"{top_k_index[token, choice]}.{p}_proj.weight"].double() for p in ("gate", "up", "down")
            )
            row = rows[token].double()
            hidden = (nn.functional.silu(gate @ row) * (up @ row)).float().unsqueeze(0)
            hidden = quantized(hidden, self.scales[1]) if self.scales else hidden
            out[token] += top_k_weights[token, choice] * (down @ hidden[0].double()).float()
        return out


def load(folder: Path, dtype: torch.dtype = torch.bfloat16, runner: str = "reference") -> Any:
    import transformers

    from aliasparam_nvfp4.integrations.transformers import use_backend

    with use_backend("reference", moe=runner):
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
