"""Writing a whole MoE layer through its layouts, and reading it back: ``python benchmarks/layouts.py [--device cuda]``.

For the shapes of one rank and every runner, from contiguous tensors on the device, beside the floor (every byte read and written
once) and beside SGLang's way (new tensors by row tables and reshapes, expert by expert for TRT-LLM). Bytes are compared before
anything is timed. On a GPU the layer, each of its tensors and one expert are timed by the wall, and by the device alone (a
captured graph), which tells what launches cost. The digest is adler32 of all checkpoint bytes from kernel memory, as a share of
the rate at which a reduction reads the same memory. On the CPU a layer has 16 experts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from aliasparam.layout import BoundLayout, Layout
from aliasparam_nvfp4.moe.layouts import MOE_LAYOUTS, MoELayout

#: Experts, hidden and intermediate size of a rank (Kimi and Qwen at TP 4, DeepSeek at TP 8).
MODELS = {
    "Kimi-K2.5": (384, 7168, 512),
    "DeepSeek-V3": (256, 7168, 256),
    "Qwen3-235B": (128, 4096, 384),
    "Qwen3-30B": (128, 2048, 192),
}
FIELDS = ("w13", "w13_scale", "w2", "w2_scale")
ROUNDS = 7


class Part(NamedTuple):
    """One of a layer's four tensors: its values, its kernel memory, and what lies between."""

    value: Tensor
    memory: Tensor
    bound: BoundLayout

    def write(self) -> None:
        self.bound.write(self.memory, self.bound.whole, self.value)

    def read(self, out: Tensor) -> None:
        self.bound.read(self.memory, self.bound.whole, out)

    def write_expert(self, expert: int = 3) -> None:
        self.bound.write(self.memory, ((expert, expert + 1), *self.bound.whole[1:]), self.value[expert : expert + 1])


def layer(kind: MoELayout, experts: int, hidden: int, inner: int, device: str) -> list[Part]:
    shapes = ((2 * inner, hidden // 2), (2 * inner, hidden // 16), (hidden, inner // 2), (hidden, inner // 16))
    parts = []
    for name, shape in zip(FIELDS, shapes, strict=True):
        layout: Layout = getattr(kind, name)
        bound = layout.bind((experts, *shape), torch.uint8)
        value = torch.randint(0, 256, bound.shape, dtype=torch.uint8, device=device)
        parts.append(Part(value, torch.zeros(bound.capacity, dtype=torch.uint8, device=device), bound))
    return parts


def sglang(kind: MoELayout, parts: list[Part]) -> list[Tensor]:
    """The same bytes as SGLang makes them: into new tensors, rows by index tables, scales by reshape, permute and contiguous."""
    w13, w13_scale, w2, w2_scale = parts
    by_expert = kind.name == "shuffled"
    made = []
    for weight, scale in ((w13, w13_scale), (w2, w2_scale)):
        rows = row_table(weight.bound).to(weight.value.device)
        tiles = "row-major" not in kind.name and kind.name != "checkpoint"
        if by_expert:
            made.append(torch.stack([expert.index_select(0, rows).contiguous() for expert in weight.value]))
            made.append(torch.stack([swizzled(expert.index_select(0, rows)) for expert in scale.value]))
        else:
            made.append(weight.value.index_select(1, rows))
            ordered = scale.value.index_select(1, rows)
            made.append(swizzled(ordered) if tiles else ordered)
    return made


def row_table(bound: BoundLayout) -> Tensor:
    """The checkpoint row of each kernel row."""
    first = bound.offsets(((0, 1), bound.whole[1], (0, 1))).view(-1)
    return first.argsort()


def swizzled(scale: Tensor) -> Tensor:
    *lead, rows, columns = scale.shape
    scale = torch.nn.functional.pad(scale, (0, -columns % 4, 0, -rows % 128))
    tiles = scale.view(*lead, scale.shape[-2] // 128, 4, 32, scale.shape[-1] // 4, 4)
    return tiles.transpose(-4, -2).contiguous().view(scale.shape)


def seconds(do: Callable[[], Any], device: str) -> float:
    """Best of several rounds, the device idle before and after."""
    best = float("inf")
    for _ in range(ROUNDS):
        synchronize(device)
        start = time.perf_counter()
        do()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def on_device(do: Callable[[int], Any], device: str, many: int = 8) -> float:
    """Seconds of the device alone for ``do(i)``."""
    if device != "cuda":
        return seconds(lambda: do(0), device)
    do(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(many):
            do(i)
    return seconds(graph.replay, device) / many


def extra_bytes(do: Callable[[], Any], device: str) -> float:
    """Peak MiB allocated above what was there."""
    if device != "cuda":
        return float("nan")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    do()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(kind: MoELayout, sizes: tuple[int, int, int], device: str) -> list[str]:
    parts = layer(kind, *sizes, device)
    outs = [torch.empty_like(part.value) for part in parts]

    def write() -> None:
        for part in parts:
            part.write()

    def read() -> None:
        for part, out in zip(parts, outs, strict=True):
            part.read(out)

    def floor() -> None:
        for part, out in zip(parts, outs, strict=True):
            out.copy_(part.value)

    def expert(at: int = 3) -> None:
        for part in parts:
            part.write_expert(at)

    def reduce() -> None:
        for part in parts:
            part.memory.view(torch.int64).amax()

    def sums() -> None:
        for part in parts:
            part.bound.positional_sums(part.memory, part.bound.whole)

    write()
    read()
    exact = all(torch.equal(out, part.value) for part, out in zip(parts, outs, strict=True))
    whole = all(part.memory.numel() == part.value.numel() for part in parts)
    theirs = whole and all(torch.equal(a.view(-1), p.memory) for a, p in zip(sglang(kind, parts), parts, strict=True))
    base, once = seconds(floor, device), seconds(write, device)
    other = seconds(lambda: sglang(kind, parts), device) if theirs else float("nan")
    extra, theirs_extra = extra_bytes(write, device), extra_bytes(lambda: sglang(kind, parts), device)
    ratios = [f"{t / base:.2f}" for t in (once, seconds(read, device), other)]
    nbytes = sum(part.value.numel() for part in parts) / 2**20
    floors = [on_device(lambda _, p=p, o=o: o.copy_(p.value), device) for p, o in zip(parts, outs, strict=True)]  # type: ignore[misc]
    writes = [on_device(lambda _, p=p: p.write(), device) for p in parts]  # type: ignore[misc]
    reads = [on_device(lambda _, p=p, o=o: p.read(o), device) for p, o in zip(parts, outs, strict=True)]  # type: ignore[misc]
    return [
        f"{nbytes:.0f}",
        f"{base * 1e3:.3f}",
        *ratios,
        *(
            f"{sum(alone) / sum(floors):.2f}: " + " ".join(f"{one / floor:.2f}" for one, floor in zip(alone, floors, strict=True))
            for alone in (writes, reads)
        ),
        f"1/{once / seconds(expert, device):.0f} 1/{sum(writes) / on_device(expert, device, 32):.0f}",
        f"{seconds(reduce, device) / seconds(sums, device):.2f}" if device == "cuda" else "",
        f"{extra:.0f} / {theirs_extra:.0f}",
        "yes" if exact else "NO",
    ]


def host_cost(device: str) -> tuple[float, float]:
    """µs of host time for a shard of one expert: plain ``copy_``, and through the layout."""
    bound = MOE_LAYOUTS[-1].w13.bind((8, 512, 64), torch.uint8)
    memory, plain = (torch.zeros(8 * 512 * 64, dtype=torch.uint8, device=device) for _ in range(2))
    shard = torch.ones(1, 256, 64, dtype=torch.uint8, device=device)
    box = ((5, 6), (0, 256), (0, 64))
    target = plain.view(8, 512, 64)

    def timed(do: Callable[[], Any]) -> float:
        best = float("inf")
        for _ in range(20):
            synchronize(device)
            start = time.perf_counter()
            for _ in range(200):
                do()
            best = min(best, (time.perf_counter() - start) / 200)
        return best * 1e6

    return timed(lambda: target.narrow(0, 5, 1).narrow(1, 0, 256).copy_(shard)), timed(lambda: bound.write(memory, box, shard))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    options = parser.parse_args()
    console, device = Console(width=190), options.device
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    console.print(f"torch {torch.__version__}, {name}. Times are multiples of the floor.", highlight=False)
    columns = (
        "MiB",
        "floor, ms",
        "write",
        "read",
        "SGLang",
        "by the device: write",
        "read",
        "expert",
        "digest",
        "extra MiB: ours / SGLang",
        "exact",
    )
    for model in options.models:
        experts, hidden, inner = MODELS[model]
        sizes = (experts, hidden, inner) if device == "cuda" else (16, hidden, inner)
        table = Table("runner", *columns, title=f"{model}: {sizes[0]} experts, H={sizes[1]}, I={sizes[2]}")
        for kind in MOE_LAYOUTS:
            table.add_row(kind.name, *measure(kind, sizes, device))
        console.print(table)
    plain, ours = host_cost(device)
    console.print(f"host time of a shard write: plain {plain:.1f} µs, through a layout {ours:.1f} µs", highlight=False)


if __name__ == "__main__":
    main()
