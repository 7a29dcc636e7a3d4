"""One real MoE layer of Kimi-K2.5 at TP=4 on the GPU, as the allocator sees it: ``python benchmarks/moe_memory.py``.

For each runner: what the layer takes, what two copies of its block scales would take, and what processing, writing one expert and
processing again take on top while they run.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from aliasparam import memory_report
from aliasparam_nvfp4 import NvFp4MoEMethod
from aliasparam_nvfp4.moe.runners import moe_runners
from benchmarks.moe import random_experts

_DIMS = (384, 7168, 512)
_MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runner", nargs="+", default=sorted(moe_runners()))
    options = parser.parse_args()
    console = Console(width=150)
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; E, H, I = {_DIMS}\n")
    table = Table(
        "runner",
        "layer, MiB",
        "two copies, MiB",
        "saved, MiB",
        "process: extra, MiB",
        "ms",
        "one expert: extra, MiB",
        "ms",
        "moved",
    )
    tensors = random_experts(*_DIMS)
    for runner in options.runner:
        table.add_row(runner, *measured(runner, tensors))
    console.print(table)


def measured(runner: str, tensors: dict[str, torch.Tensor]) -> list[str]:
    gc.collect()  # the layer before this one: module and registry know each other
    before = torch.cuda.memory_allocated()
    method, layer = NvFp4MoEMethod(runner), nn.Module()
    with torch.device("cuda"):
        method.create_weights(layer, *_DIMS, torch.bfloat16)
    for name, tensor in tensors.items():
        layer.get_parameter(name).copy_(tensor)
    # The first conversion compiles nothing and keeps small index tables: measured as it is.
    extra, took = during(lambda: method.process_weights_after_loading(layer))
    allocated = torch.cuda.memory_allocated() - before
    addresses = {n: t.data_ptr() for n, t in layer.named_buffers()}

    def one_expert() -> None:
        for name in ("w13_weight", "w2_weight", "w13_weight_scale", "w2_weight_scale"):
            layer.get_parameter(name)[7].copy_(tensors[name][7])
        method.process_weights_after_loading(layer)

    expert_extra, expert_took = during(one_expert)
    moved = sum(t.data_ptr() != addresses[n] for n, t in layer.named_buffers())
    report = memory_report(layer)
    two = allocated + report.saved_bytes
    figures = [f"{v / _MIB:.1f}" for v in (allocated, two, report.saved_bytes, extra)]
    return [*figures, f"{took * 1e3:.1f}", f"{expert_extra / _MIB:.1f}", f"{expert_took * 1e3:.2f}", str(moved)]


def during(work: Callable[[], Any]) -> tuple[int, float]:
    """(bytes above what was allocated before, seconds)."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, started = torch.cuda.memory_allocated(), time.perf_counter()
    work()
    torch.cuda.synchronize()
    took = time.perf_counter() - started
    return torch.cuda.max_memory_allocated() - before, took


if __name__ == "__main__":
    main()
