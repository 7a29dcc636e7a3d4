"""The acceptance test of a backend, for whoever has its GPU: kernel against emulator, on real shapes, across a reload."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aliasparam import reload

from ..errors import BackendError, ShapeError
from ..quantize.codec import quantize
from . import emulate
from .backends import LinearShape, linear_backend
from .method import NvFp4LinearMethod

#: (what, partitions, K): SmolLM2-135M, Qwen3-30B-A3B, Kimi-K2.5, and dims that need padding.
SHAPES: tuple[tuple[str, tuple[int, ...], int], ...] = (
    ("SmolLM2 qkv", (576, 192, 192), 576),
    ("SmolLM2 down", (576,), 1536),
    ("Qwen3-30B qkv", (4096, 512, 512), 2048),
    ("Kimi-K2.5 shared gate, up", (2048, 2048), 7168),
    ("ragged", (320,), 176),
)
TOKENS = (1, 7, 64)
#: A bf16 result is within this of exact arithmetic on the same bytes; a misread layout gives less than 3.
LEAST_DB = 35.0


@dataclass(frozen=True)
class Verdict:
    """One shape and batch: signal-to-noise of the kernel against the emulator."""

    shape: str
    tokens: int
    decibel: float
    held: bool
    detail: str = ""


def verify(backend: str, device: torch.device) -> Iterator[Verdict]:
    """Run the backend's kernel on every shape, load other weights into the same memory, and run it again.

    Raises:
        BackendError: unknown, or it cannot run on ``device``.
    """
    chosen = linear_backend(backend)
    if (reason := chosen.unavailable(device)) is not None:
        raise BackendError("this backend cannot run here", name=chosen.name, found=reason, remedy="Run this on its GPU.")
    for what, partitions, k in SHAPES:
        try:
            chosen.check_shape(LinearShape(sum(partitions), k, partitions))
        except ShapeError:
            continue
        layer = nn.Module()
        method = NvFp4LinearMethod(chosen.name)
        with torch.device(device):
            method.create_weights(layer, k, partitions, k, sum(partitions), torch.bfloat16)
        addresses: set[tuple[str, int]] = set()
        for seed in (1, 2):
            tensors = random_weights(partitions, k, seed, device)
            with reload(layer) as session:
                session.load(tensors)
            addresses |= {(n, t.data_ptr()) for n, t in layer.named_buffers()}
            for tokens in TOKENS:
                label = what if seed == 1 else f"{what}, reloaded"
                yield _one(method, layer, tensors, tokens, label)
        moved = len(addresses) != len(list(layer.named_buffers()))
        yield Verdict(f"{what}, addresses", 0, math.inf, not moved, "moved" if moved else "as they were")


def random_weights(partitions: tuple[int, ...], k: int, seed: int, device: torch.device) -> dict[str, Tensor]:
    """Checkpoint tensors of a fused layer, as ModelOpt would make them from normal weights."""
    random = torch.Generator().manual_seed(seed)
    packed, scale, total = quantize(torch.randn(sum(partitions), k, generator=random))
    tensors = {
        "weight": packed,
        "weight_scale": scale,
        "weight_scale_2": total.repeat(len(partitions)),
        "input_scale": torch.full((len(partitions),), 4.5 / 2688),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _one(method: NvFp4LinearMethod, layer: nn.Module, tensors: dict[str, Tensor], tokens: int, label: str) -> Verdict:
    backend = layer.__dict__["nvfp4_backend"]
    k = tensors["weight"].shape[1] * 2
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(tokens)).to(tensors["weight"].device, torch.bfloat16)
    quantized = None if backend.weight_only else layer.get_buffer("input_scale_inv")
    alpha = layer.get_buffer("weight_alpha" if backend.weight_only else "alpha")
    expected = emulate.linear(
        "checkpoint", x.float(), tensors["weight"], tensors["weight_scale"], alpha, quantized, n=tensors["weight"].shape[0]
    )
    found = method.apply(layer, x).double()
    decibel = signal_to_noise(found, expected)
    return Verdict(label, tokens, decibel, decibel >= LEAST_DB)


def signal_to_noise(found: Tensor, expected: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB."""
    noise = float((found - expected).square().sum())
    return 10 * math.log10(float(expected.square().sum()) / noise) if noise else math.inf
