"""Weights of 16 bits that become NVFP4 as they arrive: ``python benchmarks/arrival.py [--device cuda] [--layers 32]``.

Beside it, in the same run: whole tensors quantized by the same codec and then loaded, as a trainer does it that quantizes on the
server's device; and the limit, which reads each value and writes each byte of the result once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from aliasparam import reload
from aliasparam_nvfp4 import NvFp4LinearMethod, quantize_on_arrival
from aliasparam_nvfp4.linear.verify import random_weights
from aliasparam_nvfp4.quantize.codec import quantize

N, K = 7168, 4096
ROUNDS = 3


def served(device: str, layers: int) -> nn.Module:
    model = nn.Module()
    for number in range(layers):
        layer = nn.Module()
        with torch.device(device):
            NvFp4LinearMethod("triton").create_weights(layer, K, [N], K, N, torch.bfloat16)
        model.add_module(f"layer{number}", layer)
    stored = random_weights((N,), K, 1, torch.device(device))
    with reload(model) as session:
        session.load({f"layer{i}.{name}": tensor for i in range(layers) for name, tensor in stored.items()})
    return model


def quantized_first(weights: dict[str, Tensor], session: Any) -> dict[str, Tensor]:
    found = {}
    for name, weight in weights.items():
        packed, blocks, scale = quantize(weight)
        path = name.removesuffix(".weight")
        found |= {name: packed, f"{path}.weight_scale": blocks, f"{path}.weight_scale_2": scale}
        found[f"{path}.input_scale"] = session.tensors[f"{path}.input_scale"].clone()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=32)
    options = parser.parse_args()
    cuda = options.device == "cuda"
    model = served(options.device, options.layers)
    generator = torch.Generator(options.device).manual_seed(0)
    weights = {
        f"layer{i}.weight": torch.randn(N, K, device=options.device, dtype=torch.bfloat16, generator=generator)
        for i in range(options.layers)
    }
    nbytes = sum(weight.nbytes for weight in weights.values())
    smaller = [torch.empty(int(weight.nbytes * 9 / 32), dtype=torch.uint8, device=options.device) for weight in weights.values()]

    def limit() -> float:
        for weight, result in zip(weights.values(), smaller, strict=True):
            weight.view(torch.int64).sum()  # each byte is read
            result.fill_(1)
        return 0.0

    def loaded(policy: Any, given: Callable[[dict[str, Tensor], Any], Any]) -> Callable[[], float]:
        def do() -> float:
            with reload(model, policy=policy) as session:
                session.load(given(weights, session))
            return session.observed.pause_seconds

        return do

    arriving = lambda weights, session: quantize_on_arrival(weights, session.tensors)  # noqa: E731
    cases = [("limit: read once, write once", limit), ("quantized first, then loaded", loaded("write-through", quantized_first))]
    cases += [(f"on arrival, {policy}", loaded(policy, arriving)) for policy in ("write-through", "staged")]
    table = Table("what", "seconds", "GB/s of 16 bits", "pause, s", "device memory above the model, MiB")
    for what, do in cases:
        best, pause, peak = float("inf"), 0.0, 0.0
        for _ in range(ROUNDS):
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            held, started = torch.cuda.memory_allocated() if cuda else 0, time.perf_counter()
            paused = do()
            if cuda:
                torch.cuda.synchronize()
                peak = (torch.cuda.max_memory_allocated() - held) / 2**20
            elapsed = time.perf_counter() - started
            best, pause = (elapsed, paused) if elapsed < best else (best, pause)
        table.add_row(what, f"{best:.3f}", f"{nbytes / best / 1e9:.1f}", f"{pause:.3f}", f"{peak:.0f}" if cuda else "")
    name = torch.cuda.get_device_name() if cuda else "CPU"
    console = Console(width=140)
    console.print(
        f"torch {torch.__version__}, {name}; {options.layers} weights [{N}, {K}], {nbytes / 2**30:.2f} GiB", highlight=False
    )
    console.print(table)


if __name__ == "__main__":
    main()
