"""The demo's two checkpoints, made once and kept in a cache folder."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .base import load_base
from .export import quantize_to_nvfp4
from .finetune import STEPS, finetune
from .reparametrize import reparametrize

#: Changes whenever the recipe does, so that an old cache is not taken for a new one.
RECIPE = "smollm2-135m nvfp4 1"


@dataclass(frozen=True)
class DemoCheckpoints:
    """Two ModelOpt NVFP4 folders of the same model: A, and B in other bytes with another answer."""

    a: Path
    b: Path


def default_cache() -> Path:
    """``$ALIASPARAM_CACHE``, or ``aliasparam-nvfp4`` in the user's cache folder."""
    override = os.environ.get("ALIASPARAM_CACHE")
    if override:
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aliasparam-nvfp4"


def prepare_checkpoints(cache: Path, console: Console) -> DemoCheckpoints:
    """Make what is missing of A and B under ``cache``; a finished folder is used again at once."""
    cache.mkdir(parents=True, exist_ok=True)
    paths = {tag: cache / f"smollm2-135m-nvfp4-{tag.lower()}" for tag in ("A", "B")}
    for tag, path in paths.items():
        stamp = path.with_suffix(".stamp")
        if stamp.is_file() and stamp.read_text() == RECIPE and path.is_dir():
            console.print(f"checkpoint {tag}: [dim]{path}[/dim] (made before)")
            continue
        stamp.unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
        _make(tag, path, console)
        stamp.write_text(RECIPE)
    return DemoCheckpoints(paths["A"], paths["B"])


def _make(tag: str, destination: Path, console: Console) -> None:
    bar = Progress(TextColumn("{task.description:<46}"), BarColumn(), TimeElapsedColumn(), console=console)
    with bar:
        loading = bar.add_task(f"checkpoint {tag}: SmolLM2-135M-Instruct", total=1)
        model, tokenizer = load_base()
        bar.advance(loading)
        tuning = bar.add_task(f"checkpoint {tag}: fine-tune, {STEPS} steps", total=STEPS)
        finetune(model, tokenizer, tag, on_step=lambda: bar.advance(tuning))
        if tag == "B":
            reparametrize(model)
        exporting = bar.add_task(f"checkpoint {tag}: NVFP4 by ModelOpt", total=1)
        quantize_to_nvfp4(model.to(_bfloat16()), tokenizer, destination)
        bar.advance(exporting)


def _bfloat16() -> object:
    import torch

    return torch.bfloat16
