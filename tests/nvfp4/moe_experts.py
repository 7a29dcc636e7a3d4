"""MoE layers of every kind for tests: both checkpoint formats, with and without a gate, with and without activation scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from aliasparam_nvfp4 import MODELOPT, CheckpointFormat, NvFp4MoEMethod
from aliasparam_nvfp4.moe.activation import RELU2, SWIGLU, ExpertActivation
from aliasparam_nvfp4.moe.runners import moe_runners

from .moe_layers import SUFFIXES, Checkpoint, MoE, checkpoint

Dims = tuple[int, int, int]
OAI = ExpertActivation(alpha=1.702, beta=1.0, limit=7.0)
GATED = {"swiglu": SWIGLU, "oai": OAI}
ACTIVATIONS = {**GATED, "relu2": RELU2}
RUNNERS = sorted(moe_runners())


def serving(activation: ExpertActivation = SWIGLU, *, input_scale: bool = True) -> list[str]:
    """Runners which serve such experts."""
    return [n for n, r in sorted(moe_runners().items()) if r.refusal(activation, input_scale=input_scale) is None]


class Experts(MoE):
    """A layer made by a method with any of its arguments."""

    def __init__(self, runner: str, dims: Dims, **how: Any) -> None:
        nn.Module.__init__(self)
        self.method = NvFp4MoEMethod(runner, **how)
        self.method.create_weights(self, *dims, torch.bfloat16)


def stored(
    dims: Dims,
    seed: int = 0,
    *,
    activation: ExpertActivation = SWIGLU,
    fmt: CheckpointFormat = MODELOPT,
    input_scale: bool = True,
    **how: Any,
) -> Checkpoint:
    """(expert, shard, suffix) to tensor, as the format has them."""
    names = dict(zip(SUFFIXES, (fmt.weight, fmt.block_scale, fmt.weight_global, fmt.input_global), strict=True))
    found: Checkpoint = {}
    for (expert, shard, suffix), tensor in checkpoint(*dims, seed, **how).items():
        if (shard == "w3" and not activation.gated) or (suffix == "input_scale" and not input_scale):
            continue
        scalar = suffix in ("weight_scale_2", "input_scale")
        value = (1.0 / tensor if fmt.reciprocal else tensor).reshape(fmt.scalar_shape) if scalar else tensor
        found[expert, shard, names[suffix]] = value
    return found


def pointers(layer: nn.Module) -> dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """What a captured graph remembers of every name: address, shape and strides."""
    every = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    return {n: (t.data_ptr(), tuple(t.shape), t.stride()) for n, t in every.items()}


def rows_of(tensors: Checkpoint, expert: int, name: str, suffix: str) -> Tensor:
    """One expert's w13 (gate over up, or w1 alone) or w2."""
    shards = ("w2",) if name == "w2" else ("w1", "w3")
    return torch.cat([tensors[expert, s, suffix] for s in shards if (expert, s, suffix) in tensors])
