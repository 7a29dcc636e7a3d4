"""A model with every kind of live tensor: padded, several regions, bf16, a shard of a fused name, nibbles, a function, plain."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aliasparam import Layout, process, registry_of
from aliasparam.layout.index import IndexLayout
from aliasparam.layout.opaque import OpaqueLayout
from aliasparam.testing import same_bytes

from ..small import INTERLEAVE, SWAP, SWAP_PAD16
from ..small import Layer as DeclaredLayer
from . import folders

SCALES = "(rt r4 r32) (ct c4) -> rt ct r32 r4 c4, r4=4 r32=32 c4=4"


class Whole(nn.Module):
    """``x`` of ones through what the kernels read: a sum over every name that serves."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__()
        Layer = partial(DeclaredLayer, device=device)
        self.padded = Layer((3, 10, 12), SWAP_PAD16, scale=True)
        self.scales = Layer((130, 6), SCALES)
        self.wide = Layer((6, 8), INTERLEAVE, torch.bfloat16)
        self.table = Layer((4, 6), IndexLayout(torch.randperm(24, generator=torch.Generator().manual_seed(0)).view(4, 6)))
        self.turned = Layer((4, 6), OpaqueLayout(lambda t: t.flip(0), lambda t: t.flip(0)))
        self.nibbles = Layer((4, 8), Layout("n (k two) -> k n two, two=2", bits=4))
        self.fused = Layer((8, 4), SWAP)
        self.q, self.k = nn.Module(), nn.Module()
        fused: Any = self.fused.weight
        registry = registry_of(self.fused)
        assert registry is not None
        registry.show_shards("weight", [(self.q, "weight", fused[:5]), (self.k, "weight", fused[5:])])
        self.norm = nn.Parameter(torch.linspace(0, 1, 9, device=device), requires_grad=False)
        self.tied = self.norm
        self.register_buffer("step", torch.tensor(3, device=device))
        self.turned_plain = nn.Parameter(torch.arange(12.0, device=device).view(3, 4).t(), requires_grad=False)
        process(self)

    def forward(self) -> list[Tensor]:
        served = [layer() for layer in self.children() if isinstance(layer, DeclaredLayer)]
        plain = [value.clone() for name, value in self.named_parameters(recurse=False)]
        return [*served, self.padded.alpha.clone(), self.step + 0, *plain]  # type: ignore[operator]


class Few(Whole):
    """Fewer kinds, so that each operator of a reload can be made to fail."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(device)
        for name in ("scales", "table", "turned", "nibbles", "turned_plain", "tied"):
            delattr(self, name)


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Every byte, on whichever device."""
    return all(same_bytes(a, b) for a, b in zip(found, expected, strict=True))


def changed(tensors: dict[str, Tensor], share: float, seed: int) -> dict[str, Tensor]:
    """A copy in which about ``share`` of the bytes of every second tensor differ (of scales: finite ones)."""
    rng = random.Random(seed)
    new = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    for name in sorted(new)[seed % 2 :: 2]:
        flat = new[name].view(-1).view(torch.uint8)
        for i in rng.sample(range(flat.numel()), max(1, int(share * flat.numel()))):
            flat[i] ^= rng.randrange(1, 128)
    return new


def folder_of(path: Path, tensors: dict[str, Tensor]) -> Path:
    path.mkdir(parents=True)
    folders.safetensors(path / "model.safetensors", tensors)
    return path


def raw(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: folders.plain(tensor) for name, tensor in tensors.items()}
