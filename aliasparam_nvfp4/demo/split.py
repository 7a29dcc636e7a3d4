"""A Llama model as a mixture of experts that computes the same function: its answers tell whether it is served right.

Neurons of an MLP are summed, so they can be dealt out among experts. A router of zeros gives each of E experts the weight 1/E,
which E times the down projection makes up for (E is a power of two: exact in bf16).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Mlp = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Variant:
    """One form of the demo's model.

    Attributes:
        title: for people.
        prefix: of its folders in the cache.
        convert: from the tuned Llama model, float32, to the model that is quantized.
    """

    title: str
    prefix: str
    convert: Callable[[Any], Any]


def mixtral_8(model: Any) -> Any:
    """Mixtral with 8 experts of an eighth of the neurons (192), all chosen."""
    width = model.config.intermediate_size // 8
    return _mixtral(model, experts=8, top_k=8, intermediate=width, deal=lambda mlp, layer: _dealt(mlp, 8, 8.0), router=_even)


def mixtral_4(model: Any) -> Any:
    """Mixtral with 4 experts of which 2 are chosen, by a random router.

    Each expert is the whole MLP with its neurons in another order. So any choice gives the dense function, all experts have
    different bytes, and the gate of one with the down of another gives nonsense.
    """

    def deal(mlp: Mlp, layer: int) -> list[Mlp]:
        random, neurons = torch.Generator().manual_seed(layer), mlp[0].shape[0]
        orders = [torch.arange(neurons), *(torch.randperm(neurons, generator=random) for _ in range(3))]
        return [(mlp[0][order], mlp[1][order], mlp[2][:, order]) for order in orders]

    def router(experts: int, hidden: int, layer: int) -> Tensor:
        return torch.randn(experts, hidden, generator=torch.Generator().manual_seed(1000 + layer)) * 0.1

    return _mixtral(model, experts=4, top_k=2, intermediate=model.config.intermediate_size, deal=deal, router=router)


def qwen2_8(model: Any) -> Any:
    """Qwen2-MoE: 8 experts of a twelfth of the neurons (128), all chosen; the shared expert has the rest, its gate one half."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    width = model.config.intermediate_size // 12
    routed = 8 * width
    config = Qwen2MoeConfig(
        **_common(model), moe_intermediate_size=width, shared_expert_intermediate_size=4 * width, num_experts=8,
        num_experts_per_tok=8, norm_topk_prob=True, qkv_bias=False, decoder_sparse_step=1, mlp_only_layers=[],
        use_sliding_window=False,
    )  # fmt: skip

    def block(mlp: Mlp, layer: int) -> dict[str, Tensor]:
        gate, up, down = mlp
        return {
            **_fused(_dealt((gate[:routed], up[:routed], down[:, :routed]), 8, 8.0)),
            "gate.weight": torch.zeros(8, config.hidden_size),
            "shared_expert_gate.weight": torch.zeros(1, config.hidden_size),
            "shared_expert.gate_proj.weight": gate[routed:],
            "shared_expert.up_proj.weight": up[routed:],
            "shared_expert.down_proj.weight": down[:, routed:] * 2,
        }

    return _converted(model, Qwen2MoeForCausalLM(config), block)


DENSE = Variant("SmolLM2-135M-Instruct", "smollm2-135m-nvfp4", lambda model: model)
MIXTRAL_4 = Variant("SmolLM2-135M-Instruct as Mixtral, 2 of 4 experts", "smollm2-135m-mixtral-4-nvfp4", mixtral_4)
MIXTRAL_8 = Variant("SmolLM2-135M-Instruct as Mixtral, 8 experts", "smollm2-135m-mixtral-8-nvfp4", mixtral_8)
QWEN2_8 = Variant("SmolLM2-135M-Instruct as Qwen2-MoE, 8 experts and a shared one", "smollm2-135m-qwen2-moe-nvfp4", qwen2_8)


def _mixtral(
    model: Any,
    *,
    experts: int,
    top_k: int,
    intermediate: int,
    deal: Callable[[Mlp, int], list[Mlp]],
    router: Callable[[int, int, int], Tensor],
) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **_common(model), head_dim=model.config.head_dim, intermediate_size=intermediate, num_local_experts=experts,
        num_experts_per_tok=top_k, sliding_window=None,
    )  # fmt: skip

    def block(mlp: Mlp, layer: int) -> dict[str, Tensor]:
        return {**_fused(deal(mlp, layer)), "gate.weight": router(experts, config.hidden_size, layer)}

    return _converted(model, MixtralForCausalLM(config), block)


def _common(model: Any) -> dict[str, Any]:
    """What the configs of all models have."""
    names = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps",
        "rope_parameters", "max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    return {name: getattr(model.config, name) for name in names} | {"dtype": "bfloat16"}


@torch.no_grad()
def _converted(model: Any, made: Any, block: Callable[[Mlp, int], dict[str, Tensor]]) -> Any:
    """``made`` with the weights of ``model``; ``block`` gives a layer's tensors below ``mlp`` from those of the dense one."""
    state = {name: tensor for name, tensor in model.state_dict().items() if ".mlp." not in name}
    for index, layer in enumerate(model.model.layers):
        mlp = tuple(getattr(layer.mlp, name).weight for name in ("gate_proj", "up_proj", "down_proj"))
        state |= {f"model.layers.{index}.mlp.{name}": tensor for name, tensor in block(mlp, index).items()}
    made.load_state_dict(state)
    made.config.architectures = [type(made).__name__]
    made.generation_config = model.generation_config
    return made.eval()


def _dealt(mlp: Mlp, experts: int, factor: float) -> list[Mlp]:
    gate, up, down = mlp
    parts = zip(gate.chunk(experts), up.chunk(experts), (down * factor).chunk(experts, dim=1), strict=True)
    return list(parts)


def _fused(experts: list[Mlp]) -> dict[str, Tensor]:
    """As transformers holds them: ``[E, 2I, H]`` and ``[E, H, I]``."""
    return {
        "experts.gate_up_proj": torch.stack([torch.cat((gate, up)) for gate, up, _ in experts]),
        "experts.down_proj": torch.stack([down for _, _, down in experts]),
    }


def _even(experts: int, hidden: int, layer: int) -> Tensor:
    return torch.zeros(experts, hidden)
