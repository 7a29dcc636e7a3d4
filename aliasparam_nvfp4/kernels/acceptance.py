"""Acceptance of a kernel on the machine that has its GPU: what it gives against its emulator, across a reload."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aliasparam import reload

from ..errors import BackendError
from .base import Kernel

Tensors = dict[str, Tensor]
#: (tokens, what the kernel gives, what its emulator gives).
Answer = tuple[int, Tensor, Tensor]


@dataclass(frozen=True)
class Verdict:
    """One shape and batch: signal-to-noise of the kernel against the emulator."""

    shape: str
    tokens: int
    decibel: float
    held: bool
    detail: str = ""


def need_its_gpu(kernel: Kernel, device: torch.device) -> None:
    """Raise BackendError where ``kernel`` cannot run on ``device``."""
    if (reason := kernel.unavailable(device)) is not None:
        raise BackendError(f"this {kernel.what} cannot run here", name=kernel.name, found=reason, remedy="Run this on its GPU.")


def judged(what: str, answers: Iterable[Answer], least: float) -> Iterator[Verdict]:
    """Answers that are within ``least`` dB of the emulator's hold."""
    for tokens, found, expected in answers:
        decibel = signal_to_noise(found.double(), expected)
        yield Verdict(what, tokens, decibel, decibel >= least)


def across_a_reload(
    layer: nn.Module, what: str, weights: Callable[[int], Tensors], answers: Callable[[Tensors], Iterable[Answer]], least: float
) -> Iterator[Verdict]:
    """Load weights, look at the answers, load others into the same memory, and look again; last, whether an address moved."""
    addresses: set[tuple[str, int]] = set()
    for seed, label in ((1, what), (2, f"{what}, reloaded")):
        tensors = weights(seed)
        with reload(layer) as session:
            session.load(tensors)
        addresses |= {(n, t.data_ptr()) for n, t in layer.named_buffers()}
        yield from judged(label, answers(tensors), least)
    moved = len(addresses) != len(list(layer.named_buffers()))
    yield Verdict(f"{what}, addresses", 0, math.inf, not moved, "moved" if moved else "as they were")


def signal_to_noise(found: Tensor, expected: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB."""
    noise = float((found - expected).square().sum())
    return 10 * math.log10(float(expected.square().sum()) / noise) if noise else math.inf
