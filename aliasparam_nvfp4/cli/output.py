"""What commands print: text as it is, tables that fold, JSON, and progress on standard error."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .terminal import plain


class _Console(Console):
    """Text is never markup, and a reader that has gone is an exception (guard.py ends the process)."""

    def __init__(self, *, stderr: bool = False) -> None:
        # Where it is no terminal nothing folds, so that grep and cut see whole rows.
        width = None if os.environ.get("COLUMNS") or (sys.stderr if stderr else sys.stdout).isatty() else 1000
        file = sys.stderr if stderr else None  # as it is now: libraries are silenced while a bar is shown
        super().__init__(markup=False, highlight=False, emoji=False, file=file, width=width)

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


def console() -> Console:
    """Standard output."""
    return _Console()


def say(text: str = "", *, end: str = "\n") -> None:
    """Print a line as it is: no markup, no folding, no control characters."""
    sys.stdout.write(plain(text) + end)
    sys.stdout.flush()


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> None:
    """Print a table. Cells fold where the terminal is narrow."""
    shown = Table()
    for column in columns:
        shown.add_column(Text(column), overflow="fold")
    for row in rows:
        shown.add_row(*(cell if isinstance(cell, Text) else Text(plain(cell)) for cell in row))
    console().print(shown)


def say_json(document: Any) -> None:
    """Print one JSON document, ASCII alone, without the numbers that JSON does not have."""
    sys.stdout.write(json.dumps(_finite(document), indent=2, allow_nan=False) + "\n")
    sys.stdout.flush()


def progress() -> Progress:
    """A bar on standard error; nothing where that is no terminal."""
    err = _Console(stderr=True)
    bars = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    return Progress(*bars, console=err, transient=True, disable=not err.is_terminal)


def mib(count: float) -> str:
    """Bytes as MiB, or GiB from one on."""
    return f"{count / (1 << 30):.2f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.2f} MiB"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
