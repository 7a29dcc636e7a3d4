"""What the storage abstraction costs, beside plain tensors in the same run: ``python benchmarks/core.py [--device cuda]``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from aliasparam import Alias, Derivation, Layout, declare, process

UP_GATE = Layout("(h i) k -> ~h i k, h=2")
EXPERTS, ROWS, COLUMNS = 64, 32, 256
MANY_EXPERTS = 384
MODULES = 200
ROUNDS = 200  # short ones: between two turns of other processes
CALLS = 100
FIRST_LOADS = 20  # tensors of fresh memory, each loaded in several rounds
AT_A_TIME = 16


class Linear(nn.Module):
    def __init__(self, device: str, *, declared: bool) -> None:
        super().__init__()
        weight = torch.zeros(EXPERTS, ROWS, COLUMNS, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(torch.ones(3, device=device), requires_grad=False)
        if declared:
            declare(
                self,
                Alias("weight", "weight_prepared", UP_GATE),
                Derivation("alpha", ("scale",), _largest, (1,), torch.float32),
            )
            process(self)
        else:
            self.weight_prepared = nn.Parameter(weight.clone(), requires_grad=False)
            self.alpha = nn.Parameter(torch.ones(1, device=device), requires_grad=False)


def _largest(scale: torch.Tensor) -> torch.Tensor:
    return scale.max().reshape(1)


def seconds(do: Callable[[], Any], repeat: int = CALLS, rounds: int = ROUNDS) -> float:
    """Best of several rounds, per call."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(repeat):
            do()
        best = min(best, (time.perf_counter() - start) / repeat)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=25_000, help="layers of four parameters to declare")
    options = parser.parse_args()
    console = Console(width=110)
    device = options.device
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    console.print(f"torch {torch.__version__}, {name}; host time per call, nothing waits for the device\n", highlight=False)
    table = Table("what", "plain, µs", "aliased, µs", "above plain, µs")
    for what, plain, aliased in cases(device):
        a, b = seconds(plain) * 1e6, seconds(aliased) * 1e6
        table.add_row(what, f"{a:.2f}", f"{b:.2f}", f"{b - a:+.2f}")
    for what, plain, aliased, many in (processing(device), *first_loads(device)):
        a, b = (seconds(do, 1) / many * 1e6 for do in (plain, aliased))
        table.add_row(what, f"{a:.2f}", f"{b:.2f}", f"{b - a:+.2f}")
    console.print(table)
    declaring(console, options.layers)


def cases(device: str) -> list[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    plain, aliased = Linear(device, declared=False), Linear(device, declared=True)
    loading = Linear(device, declared=True)
    shard = torch.zeros(ROWS, COLUMNS, dtype=torch.uint8, device=device)
    x = torch.zeros(8, device=device)

    def write(layer: Any) -> Callable[[], Any]:
        return lambda: layer.weight.narrow(0, 5, 1).copy_(shard)

    def write_through_data(layer: Any) -> Callable[[], Any]:
        return lambda: layer.weight.data[5].copy_(shard)

    return [
        ("read a kernel name and use it", lambda: x * plain.alpha, lambda: x * aliased.alpha),
        ("look a kernel name up", lambda: plain.weight_prepared, lambda: aliased.weight_prepared),
        ("read a checkpoint name", lambda: plain.weight[5].clone(), lambda: aliased.weight[5].clone()),
        ("write a shard: narrow().copy_()", write(plain), write(loading)),
        ("write a shard: data\\[i].copy_()", write_through_data(plain), write_through_data(loading)),
    ]


def processing(device: str) -> tuple[str, Callable[[], Any], Callable[[], Any], int]:
    """Processing a model that nothing was written to, beside a loop over its modules; and how many they are."""
    model = nn.Sequential(*(Linear(device, declared=True) for _ in range(MODULES)))

    def loop() -> None:
        for _ in model.named_modules():
            pass

    return "process a model that nothing was written to, each module", loop, lambda: process(model), MODULES


def first_loads(device: str) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any], int]]:
    """Filling a stack of many experts that was never written, into fresh memory; and how many shards each call writes."""
    expert = torch.zeros(ROWS, COLUMNS, dtype=torch.uint8, device=device)
    half = ROWS // 2

    def empty(*, declared: bool) -> torch.Tensor:
        module = nn.Module()
        weight = torch.zeros(MANY_EXPERTS, ROWS, COLUMNS, dtype=torch.uint8, device=device)
        module.weight = nn.Parameter(weight, requires_grad=False)
        if declared:
            declare(module, Alias("weight", "weight_prepared", UP_GATE), loaded=False)
        return module.weight

    def whole(weight: torch.Tensor, experts: range) -> None:
        for e in experts:
            weight.data[e].copy_(expert)

    def halves(weight: torch.Tensor, experts: range) -> None:
        for e in experts:
            weight.data[e].narrow(0, 0, half).copy_(expert[:half])
            weight.data[e].narrow(0, half, half).copy_(expert[half:])

    for what, load, shards in (("whole", whole, AT_A_TIME), ("in halves, each", halves, 2 * AT_A_TIME)):
        tensors = {d: [empty(declared=d) for _ in range(FIRST_LOADS)] for d in (False, True)}
        parts = [range(e, e + AT_A_TIME) for e in range(0, MANY_EXPERTS, AT_A_TIME)]
        rounds = {d: iter([(tensor, part) for tensor in tensors[d] for part in parts]) for d in tensors}
        yield (
            f"first load of {MANY_EXPERTS} experts, {what}",
            lambda load=load, r=rounds[False]: load(*next(r)),  # type: ignore[misc]
            lambda load=load, r=rounds[True]: load(*next(r)),  # type: ignore[misc]
            shards,
        )


def declaring(console: Console, layers: int) -> None:
    modules = [nn.Module() for _ in range(layers)]
    for module in modules:
        for name in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
            shape = (4, 8) if name.startswith("weight") and name[-1] != "2" else (1,)
            module.register_parameter(name, nn.Parameter(torch.empty(shape), requires_grad=False))
    start = time.perf_counter()
    for module in modules:
        declare(
            module,
            Alias("weight", "weight_prepared", UP_GATE),
            Alias("weight_scale", "weight_scale_prepared", UP_GATE),
            Derivation("alpha", ("weight_scale_2", "input_scale"), torch.mul, (1,), torch.float32),
            loaded=False,
        )
    elapsed = time.perf_counter() - start
    console.print(
        f"\ndeclaring {4 * layers} parameters in {layers} modules: {elapsed:.2f} s ({elapsed / layers / 4 * 1e6:.0f} µs each)"
    )


if __name__ == "__main__":
    main()
