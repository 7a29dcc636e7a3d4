"""The same function in other bytes.

A fine-tune of a few steps moves few NVFP4 bytes and hardly a global scale, so a reload that forgets the scales would still
answer right. This changes nearly every byte without changing the function: neurons and head groups are permuted, and factors
moved between matrices whose product is what counts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def reparametrize(model: Any, seed: int = 7, factor: float = 1.25) -> None:
    """Re-parametrize a Llama model in place; outputs stay equal up to rounding.

    Per layer: MLP neurons permuted (rows of gate and up, columns of down); key-value groups permuted (whole heads, so rotary
    embeddings are untouched); up, q and v times ``factor`` and down, k and o divided by it.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    groups = config.num_key_value_heads
    for layer in model.model.layers:
        mlp, attention = layer.mlp, layer.self_attn
        neurons = torch.randperm(mlp.gate_proj.weight.shape[0], generator=generator)
        mlp.gate_proj.weight.copy_(mlp.gate_proj.weight[neurons])
        mlp.up_proj.weight.copy_(mlp.up_proj.weight[neurons] * factor)
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, neurons] / factor)

        order = torch.randperm(groups, generator=generator)
        queries = _group_rows(order, config.num_attention_heads // groups * head_dim)
        keys = _group_rows(order, head_dim)
        attention.q_proj.weight.copy_(attention.q_proj.weight[queries] * factor)
        attention.k_proj.weight.copy_(attention.k_proj.weight[keys] / factor)
        attention.v_proj.weight.copy_(attention.v_proj.weight[keys] * factor)
        attention.o_proj.weight.copy_(attention.o_proj.weight[:, queries] / factor)


def _group_rows(order: Tensor, width: int) -> Tensor:
    """Row indices which put groups of ``width`` rows into ``order``."""
    return (order[:, None] * width + torch.arange(width)).reshape(-1)
