"""A captured CUDA graph goes on being right across reloads, because no address moves (law 3)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from aliasparam import Alias, Derivation, declare, reload

from .small import SWAP


class Layer(nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(64, 32, device=device), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(2, device=device), requires_grad=False)
        declare(
            self,
            Alias("weight", "prepared", SWAP),
            Derivation("alpha", ("scale",), torch.max, (), torch.float32),
            loaded=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.get_buffer("prepared").t() * self.get_buffer("alpha")


def weights(seed: int, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(64, 32, generator=generator).to(device),
        "scale": torch.rand(2, generator=generator).to(device),
    }


def load(layer: Layer, seed: int, device: str) -> None:
    with reload(layer) as session:
        session.load(weights(seed, device))


def test_tensors_held_by_a_kernel_object_follow_every_reload() -> None:
    """The law without a GPU: what was looked up once, as a graph does, is right after each reload."""
    layer, x = Layer("cpu"), torch.ones(1, 32)
    load(layer, 1, "cpu")
    held_weight, held_alpha = layer.get_buffer("prepared"), layer.get_buffer("alpha")

    for seed in (2, 1, 3):
        load(layer, seed, "cpu")
        assert torch.equal(x @ held_weight.t() * held_alpha, layer(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_a_captured_graph_replays_the_new_weights() -> None:
    layer, x = Layer("cuda"), torch.ones(1, 32, device="cuda")
    load(layer, 1, "cuda")
    layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)

    for seed in (1, 2, 1, 3):
        load(layer, seed, "cuda")
        graph.replay()
        cold = Layer("cuda")
        load(cold, seed, "cuda")
        assert torch.equal(out, cold(x))
