"""Time, memory and tables of a benchmark."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

_MIB = 1 << 20


@dataclass
class Row:
    """Seconds and bytes."""

    what: str
    policy: str
    prepare: float
    pause: float
    held: int | None
    host: int | None
    device: int | None
    nbytes: int

    def cells(self) -> list[str]:
        rate = self.nbytes / (self.prepare + self.pause) / 1e9
        sizes = ["-" if n is None else f"{n / _MIB:.1f}" for n in (self.held, self.host, self.device)]
        return [self.what, self.policy, f"{self.prepare:.3f}", f"{self.pause:.4f}", *sizes, f"{rate:.2f}"]


class Meter:
    """Measures on ``device``; shows figures and keeps them."""

    def __init__(self, device: str) -> None:
        self.device, self.cuda = device, device == "cuda"
        self.console = Console(width=120, highlight=False)
        self.figures: dict[str, Any] = {}

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def peaks(self, row: Row) -> Iterator[None]:
        before = _host(reset=True)
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            device = torch.cuda.memory_allocated()
        yield
        after = _host()
        row.host = None if before is None or after is None else max(after - before, 0)
        row.device = torch.cuda.max_memory_allocated() - device if self.cuda else None

    def show(self, title: str, rows: list[Row]) -> None:
        table = Table("source", "policy", "prepare, s", "pause, s", "held, MiB", "host, MiB", "device, MiB", "GB/s", title=title)
        for row in rows:
            table.add_row(*row.cells())
        self.console.print(table)
        self.figures[title] = [asdict(row) for row in rows]

    def say(self, key: str, text: str, **figures: float) -> None:
        self.console.print(f"{key}: {text}")
        self.figures[key] = figures

    def seconds(self, do: Callable[[], Any], rounds: int = 5) -> float:
        found = []
        for _ in range(rounds):
            begun = self.now()
            do()
            found.append(self.now() - begun)
        return statistics.median(found)


def _host(*, reset: bool = False) -> int | None:
    """Peak of resident memory since the last reset, in bytes."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        text = Path("/proc/self/status").read_text()
        return int(text.partition("VmHWM:")[2].split()[0]) << 10
    except (OSError, ValueError, IndexError):
        return None
