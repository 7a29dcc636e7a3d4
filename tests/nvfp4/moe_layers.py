"""MoE layers and checkpoints for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from aliasparam_nvfp4 import NvFp4MoEMethod
from aliasparam_nvfp4.codec import dequantize, quantize

SUFFIXES = ("weight", "weight_scale", "weight_scale_2", "input_scale")
#: (E, H, I): aligned; SmolLM2's experts; ragged in everything.
SHAPES = [(2, 128, 128), (3, 576, 192), (2, 80, 48)]


class MoE(nn.Module):
    """A layer which refuses stale names at its forward, as engines' layers do."""

    def __init__(self, runner: str, e: int, h: int, i: int, **parallel: int) -> None:
        super().__init__()
        self.method = NvFp4MoEMethod(runner, **parallel)
        self.method.create_weights(self, e, h, i, torch.bfloat16)

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return self.method.apply(self, x, topk_weights, topk_ids)


Checkpoint = dict[tuple[int, str, str], Tensor]


def checkpoint(e: int, h: int, i: int, seed: int = 0, *, untied: bool = False) -> Checkpoint:
    """(expert, shard, suffix) to tensor, as ModelOpt has them."""
    random = torch.Generator().manual_seed(seed)
    found: Checkpoint = {}
    for expert in range(e):
        for shard, dims in (("w1", (i, h)), ("w3", (i, h)), ("w2", (h, i))):
            width = dims[1] ** 0.5  # outputs of about 1, as trained layers have
            total = torch.tensor((4.0 + expert + seed) / width) / 2688
            own = total * 1.5 if untied and shard == "w3" else total
            packed, scale, own = quantize(torch.randn(dims, generator=random) / width, own)
            amax = 5.0 + expert + (5.0 if shard == "w2" else 0.5 if shard == "w3" else 0)
            for suffix, tensor in zip(SUFFIXES, (packed, scale, own, torch.tensor(amax / 2688)), strict=True):
                found[expert, shard, suffix] = tensor
    return found


def load(layer: Any, tensors: Checkpoint, *, process: bool = True) -> None:
    for (expert, shard, suffix), tensor in tensors.items():
        param = layer.get_parameter(f"{'w2' if shard == 'w2' else 'w13'}_{suffix}")
        param.weight_loader(param, tensor, f"experts.{expert}.{shard}.{suffix}", shard, expert)
    if process:
        layer.method.process_weights_after_loading(layer)


def dense(tensors: Checkpoint, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """The layer in float64 from the checkpoint, activations as they are."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(x.shape[0]):
        for weight, expert in zip(weights[t].tolist(), ids[t].tolist(), strict=True):
            w1, w3, w2 = (dequantize(*(tensors[expert, s, f] for f in SUFFIXES[:3])).double() for s in ("w1", "w3", "w2"))
            row = x[t].double()
            out[t] += weight * (w2 @ (nn.functional.silu(w1 @ row) * (w3 @ row)))
    return out


def choices(tokens: int, e: int, h: int, k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, h, generator=random)
    weights, ids = torch.rand(tokens, e, generator=random).softmax(-1).topk(min(k, e))
    return x, weights, ids.int()


def names(layer: nn.Module) -> dict[str, bytes]:
    """Bytes of every parameter and buffer."""
    every = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    return {n: t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for n, t in every.items()}
