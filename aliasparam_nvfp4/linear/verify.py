"""The acceptance test of a backend, for whoever has its GPU: kernel against emulator, on real shapes, across a reload."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import ShapeError
from ..kernels.acceptance import Answer, across_a_reload, need_its_gpu
from ..kernels.acceptance import Verdict as Verdict
from ..kernels.acceptance import signal_to_noise as signal_to_noise
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


def verify(backend: str, device: torch.device) -> Iterator[Verdict]:
    """Run the backend's kernel on every shape, load other weights into the same memory, and run it again.

    Raises:
        BackendError: unknown, or it cannot run on ``device``.
    """
    chosen = linear_backend(backend)
    need_its_gpu(chosen, device)
    for what, partitions, k in SHAPES:
        try:
            chosen.check_shape(LinearShape(sum(partitions), k, partitions))
        except ShapeError:
            continue
        layer, method = nn.Module(), NvFp4LinearMethod(chosen.name)
        with torch.device(device):
            method.create_weights(layer, k, partitions, k, sum(partitions), torch.bfloat16)
        yield from across_a_reload(
            layer,
            what,
            partial(random_weights, partitions, k, device=device),
            partial(_answers, method, layer),
            LEAST_DB,
        )


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


def _answers(method: NvFp4LinearMethod, layer: nn.Module, tensors: dict[str, Tensor]) -> Iterator[Answer]:
    backend, (n, half_k) = layer.__dict__["nvfp4_backend"], tensors["weight"].shape
    quantized = None if backend.weight_only else layer.get_buffer("input_scale_inv")
    alpha = layer.get_buffer("weight_alpha" if backend.weight_only else "alpha")
    for tokens in TOKENS:
        x = torch.randn(tokens, 2 * half_k, generator=torch.Generator().manual_seed(tokens)).to(alpha.device, torch.bfloat16)
        stored = tensors["weight"], tensors["weight_scale"]
        yield tokens, method.apply(layer, x), emulate.linear("checkpoint", x.float(), *stored, alpha, quantized, n=n)
