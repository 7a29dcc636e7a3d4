"""Decode GEMMs of the `triton` backend beside bf16 cuBLAS and a plain copy, in one run: ``python benchmarks/linear.py``.

Every timing replays a CUDA graph over enough copies of the weights that none is left in the L2 cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from rich.console import Console
from rich.table import Table

from aliasparam_nvfp4.kernels.triton_linear import linear
from aliasparam_nvfp4.layouts import swizzle

SHAPES = {
    "Kimi-K2.5 gate, up (dense)": (36864, 7168),
    "Kimi-K2.5 down (dense)": (7168, 18432),
    "Kimi-K2.5 gate, up (shared)": (4096, 7168),
    "Qwen3-30B qkv": (5120, 2048),
    "Qwen3-30B o": (2048, 4096),
}
_CACHE_BYTES = 220_000_000


def microseconds(calls: Sequence[Callable[[], Any]], rounds: int = 4) -> float:
    """Best of five replays of a graph that makes every call ``rounds`` times; per call."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    best = float("inf")
    for _ in range(6):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end) * 1e3 / rounds / len(calls))
    return best


def copies(make: Callable[[], Any], nbytes: int) -> list[Any]:
    return [make() for _ in range(max(2, _CACHE_BYTES // nbytes + 1))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 16])
    options = parser.parse_args()
    console = Console(width=120)
    bandwidth = copy_bandwidth()
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; copy {bandwidth:.0f} GB/s (read and write)\n")
    table = Table("layer", "N × K", "tokens", "bf16, µs", "ours, µs", "GB/s", "of copy", "against bf16")
    for name, (n, k) in SHAPES.items():
        for tokens, plain, ours in compare(n, k, options.tokens):
            rate = packed_bytes(n, k) / ours / 1e3
            figures = (f"{plain:.1f}", f"{ours:.1f}", f"{rate:.0f}", f"{rate / bandwidth:.2f}", f"{plain / ours:.2f}×")
            table.add_row(name, f"{n} × {k}", str(tokens), *figures)
    console.print(table)


@triton.jit
def _copy(source_ptr, target_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + at, tl.load(source_ptr + at))


def copy_bandwidth() -> float:
    """GB/s of a 1 GiB copy by a kernel, bytes read and written. (``Tensor.copy_`` is slower: it uses the copy engine.)"""
    source = torch.zeros(1 << 28, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    grid = (source.numel() // 8192,)
    return 2 * source.nbytes / microseconds([lambda: _copy[grid](source, target, BLOCK=8192, num_warps=8)], 10) / 1e3


def compare(n: int, k: int, batches: Sequence[int]) -> list[tuple[int, float, float]]:
    """(tokens, µs of bf16, µs of ours) for each batch size."""
    weights = copies(lambda: prepared(n, k), packed_bytes(n, k))
    dense = copies(lambda: torch.randn(n, k, device="cuda", dtype=torch.bfloat16), 2 * n * k)
    alpha = torch.ones(1, device="cuda")
    rows = []
    for tokens in batches:
        x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16)
        plain = microseconds([partial(torch.nn.functional.linear, x, w) for w in dense])
        ours = microseconds([partial(linear, x, *w, alpha, n=n) for w in weights])
        rows.append((tokens, plain, ours))
    return rows


def packed_bytes(n: int, k: int) -> int:
    """Codes and block scales."""
    return n * k // 2 + n * k // 16


def prepared(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    scale = torch.randint(40, 90, (n, k // 16), dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    return weight, swizzle().bind(scale.shape, scale.dtype).encode(scale)


if __name__ == "__main__":
    main()
