"""A bf16 model to an NVFP4 checkpoint folder in ModelOpt's format, by this package's own codec.

The demo then needs neither ModelOpt nor what it needs. Tests hold every tensor against ModelOpt's own export, bit for bit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..quantize.codec import quantize
from ..quantize.format import E2M1_MAX, E4M3_MAX
from ._quiet import quiet

CALIBRATION = (
    "What is the capital of France?",
    "What is 2+2?",
    "Name three colors.",
    "Tell me about the sea.",
)
#: Projections that read the same input, which get one weight global scale.
_TOGETHER = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
#: How files call the block of experts, and an expert's projections (gate, up, down).
_EXPERTS = {"mixtral": ("block_sparse_moe", ("w1", "w3", "w2"))}
_OTHERS = ("mlp", ("gate_proj", "up_proj", "down_proj"))
#: The last part of the name of linear layers that are not quantized: routers, and gates of shared experts.
_LEFT_ALONE = ("lm_head", "gate")
_RANGE = E2M1_MAX * E4M3_MAX


def quantize_to_nvfp4(model: Any, tokenizer: Any, destination: Path) -> None:
    """Write ``model`` (bf16; Llama, Mixtral or Qwen2-MoE) to the new folder ``destination``, with linear layers and experts
    quantized as ModelOpt's NVFP4_DEFAULT_CFG does; the embedding, lm_head and routers are left as they are.
    """
    from ..integrations.transformers.load import chat_ids

    destination.mkdir(parents=True)
    with quiet(), torch.no_grad():
        tensors = nvfp4_tensors(model, [chat_ids(tokenizer, prompt) for prompt in CALIBRATION])
        save_file(tensors, destination / "model.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(destination)
        model.generation_config.save_pretrained(destination)
        tokenizer.save_pretrained(destination)
    config = destination / "config.json"
    ignored = ["lm_head", *(name for name in _modules(tensors) if name.endswith(_LEFT_ALONE[1]))]
    quantization = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ignored}
    served = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")  # a cast model's config says what it was
    fields = json.loads(config.read_text()) | {"dtype": served, "quantization_config": quantization}
    config.write_text(json.dumps(fields, indent=2))


def nvfp4_tensors(model: Any, prompts: list[Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors by the names that files have. ``prompts`` are token ids ``[1, T]`` for the activation scales."""
    seen = _inputs(model, prompts)
    block, projections = _EXPERTS.get(model.config.model_type, _OTHERS)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith(_LEFT_ALONE)}
    largest: dict[str, Tensor] = {}
    for name, module in linears.items():
        group = _group(name)
        largest[group] = torch.maximum(largest.get(group, torch.zeros(())), _amax(module.weight))
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        module = name.rpartition(".")[0]
        if module in linears and name.endswith(".weight"):
            tensors |= _quantized(module, parameter, largest[_group(module)], seen[name])
        elif parameter.dim() == 3:
            tensors |= _experts(_filed(module, block), projections, name, parameter, seen[name])
        else:  # a tied lm_head is no parameter of its own
            tensors[_filed(name, block)] = parameter.detach().contiguous()
    return tensors


def _filed(name: str, block: str) -> str:
    """As files call it: in some models the block of experts and its router have another name there."""
    return re.sub(r"\.mlp\.(?=experts|gate\.)", f".{block}.", name)


def _experts(path: str, names: tuple[str, str, str], name: str, fused: Tensor, seen: Tensor) -> dict[str, Tensor]:
    """One tensor for each expert and projection, of ``gate_up_proj [E, 2I, H]`` or ``down_proj [E, H, I]``."""
    tensors: dict[str, Tensor] = {}
    for index, expert in enumerate(fused):
        parts = zip(names[:2], expert.chunk(2), strict=True) if name.endswith("gate_up_proj") else [(names[2], expert)]
        for projection, weight in parts:
            tensors |= _quantized(f"{path}.{index}.{projection}", weight, _amax(expert), seen)
    return tensors


def _quantized(module: str, weight: Tensor, amax: Tensor, seen: Tensor) -> dict[str, Tensor]:
    packed, scale, total = quantize(weight.detach(), amax / _RANGE)
    scales = {"weight_scale": scale, "weight_scale_2": total, "input_scale": seen / _RANGE}
    return {f"{module}.weight": packed, **{f"{module}.{name}": tensor.clone() for name, tensor in scales.items()}}


def _inputs(model: Any, prompts: list[Tensor]) -> dict[str, Tensor]:
    """The largest magnitude, f32, of what each weight was multiplied with."""
    implementation, model.config._experts_implementation = getattr(model.config, "_experts_implementation", None), "eager"
    observer = _Observer(dict(model.named_parameters()))
    with observer:
        for ids in prompts:
            model(input_ids=ids, use_cache=False)
    model.config._experts_implementation = implementation
    return observer.largest


class _Observer(TorchFunctionMode):
    """Sees every ``linear``, of modules and of experts in fused tensors."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.names = {p.untyped_storage().data_ptr(): name for name, p in parameters.items()}
        self.largest: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear:
            name = self.names.get(args[1].untyped_storage().data_ptr())
            if name is not None and args[0].numel():
                self.largest[name] = torch.maximum(self.largest.get(name, torch.zeros(())), _amax(args[0]))
        return func(*args, **(kwargs or {}))


def _amax(values: Tensor) -> Tensor:
    return values.detach().abs().amax().float()


def _group(module: str) -> str:
    parent, _, leaf = module.rpartition(".")
    return f"{parent}.{_TOGETHER.get(leaf, leaf)}"


def _modules(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    return (name.rpartition(".")[0] for name in tensors)
