"""MoE layers and checkpoints for tests."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from aliasparam_nvfp4 import NvFp4MoEMethod
from aliasparam_nvfp4.quantize.codec import dequantize, quantize, quantize_activation, scaled_codes

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
    return {key: tensor.clone() for key, tensor in _checkpoint(e, h, i, seed, untied).items()}


@lru_cache(maxsize=64)
def _checkpoint(e: int, h: int, i: int, seed: int, untied: bool) -> Checkpoint:
    random = torch.Generator().manual_seed(seed)
    found: Checkpoint = {}
    each = torch.arange(e).float()
    for shard, dims in (("w1", (i, h)), ("w3", (i, h)), ("w2", (h, i))):
        width = dims[1] ** 0.5  # outputs of about 1, as trained layers have
        own = (4.0 + each + seed) / width / 2688 * (1.5 if untied and shard == "w3" else 1.0)
        packed, scale, _ = quantize(torch.randn(e, *dims, generator=random) / width, own.view(e, 1, 1))
        amax = 5.0 + each + (5.0 if shard == "w2" else 0.5 if shard == "w3" else 0)
        for suffix, tensors in zip(SUFFIXES, (packed, scale, own, amax / 2688), strict=True):
            found |= {(expert, shard, suffix): tensor.clone() for expert, tensor in enumerate(tensors)}
    return found


def stacked(tensors: Checkpoint, shards: tuple[str, ...], suffix: str, rows: int, columns: int) -> Tensor:
    """u8 ``[E, rows * len(shards), columns]``: the shards of every expert one after another, each padded with zeros."""
    e = 1 + max(expert for expert, _, _ in tensors)
    parts = [torch.stack([tensors[x, s, suffix].view(torch.uint8) for x in range(e)]) for s in shards]
    return torch.cat([nn.functional.pad(p, (0, columns - p.shape[2], 0, rows - p.shape[1])) for p in parts], 1)


def load_whole(layer: Any, tensors: Checkpoint) -> None:
    """The same as :func:`load`, a tensor of all experts at a time."""
    for name, shards in (("w13", ("w1", "w3")), ("w2", ("w2",))):
        for suffix in SUFFIXES:
            param = layer.get_parameter(f"{name}_{suffix}")
            each = range(param.shape[0])
            rows = [torch.cat([tensors[e, s, suffix].reshape(-1) for s in shards]) for e in each]
            param.weight_loader(param, torch.stack(rows).view(param.shape), suffix)
    layer.method.process_weights_after_loading(layer)


def load(layer: Any, tensors: Checkpoint, *, process: bool = True) -> None:
    for (expert, shard, suffix), tensor in tensors.items():
        param = layer.get_parameter(f"{'w2' if shard == 'w2' else 'w13'}_{suffix}")
        param.weight_loader(param, tensor, f"experts.{expert}.{shard}.{suffix}", shard, expert)
    if process:
        layer.method.process_weights_after_loading(layer)


def dense(tensors: Checkpoint, x: Tensor, weights: Tensor, ids: Tensor, *, inputs: str = "as they are") -> Tensor:
    """The layer in float64 from the checkpoint.

    Args:
        tensors: all experts.
        x: activations.
        weights: of the choices.
        ids: chosen experts.
        inputs: whether activations are quantized: "as they are", with the largest scale "of all" experts, or with "each" one's.
    """
    out = torch.zeros(x.shape, dtype=torch.float64)

    def quantized(row: Tensor, expert: int, shards: tuple[str, ...]) -> Tensor:
        if inputs == "as they are":
            return row
        scales = {e: t for (e, s, f), t in tensors.items() if f == "input_scale" and s == shards[-1]}  # w3's is above w1's
        scale = scales[expert] if inputs == "each" else max(scales.values())
        return scaled_codes(*quantize_activation(row.unsqueeze(0), 1.0 / scale))[0].double() * scale.double()

    for t in range(x.shape[0]):
        for weight, expert in zip(weights[t].tolist(), ids[t].tolist(), strict=True):
            w1, w3, w2 = (dequantize(*(tensors[expert, s, f] for f in SUFFIXES[:3])).double() for s in ("w1", "w3", "w2"))
            row = quantized(x[t].double(), expert, ("w1", "w3"))
            hidden = quantized(nn.functional.silu(w1 @ row) * (w3 @ row), expert, ("w2",))
            out[t] += weight * (w2 @ hidden)
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
