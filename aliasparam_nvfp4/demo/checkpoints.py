"""The demo's two checkpoints in each of its variants, made once and kept in a cache folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ._quiet import quiet
from .base import load_base
from .export import quantize_to_nvfp4
from .finetune import STEPS, finetune
from .reparametrize import reparametrize
from .split import DENSE, Variant

#: Changes whenever the recipe does, so that an old cache is not taken for a new one.
RECIPE = "smollm2-135m nvfp4 1"
#: And of what is made of the fine-tuned ones.
_EXPORT = ", exported 2"


@dataclass(frozen=True)
class DemoCheckpoints:
    """Two NVFP4 folders of the same model: A, and B in other bytes with another answer."""

    a: Path
    b: Path


def default_cache() -> Path:
    """``$ALIASPARAM_CACHE``, or ``aliasparam-nvfp4`` in the user's cache folder."""
    override = os.environ.get("ALIASPARAM_CACHE")
    if override:
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aliasparam-nvfp4"


def prepare_checkpoints(cache: Path, console: Console, variant: Variant = DENSE) -> DemoCheckpoints:
    """Make what is missing of A and B under ``cache``; a finished folder is used again at once."""
    paths = {tag: cache / f"{variant.prefix}-{tag.lower()}" for tag in ("A", "B")}
    for tag, path in paths.items():
        if _kept(path, RECIPE + _EXPORT):
            console.print(f"checkpoint {tag}: {path} (made before)", soft_wrap=True)
            continue
        with _making(path, RECIPE + _EXPORT):
            _make(tag, path, console, variant)
    return DemoCheckpoints(paths["A"], paths["B"])


def _make(tag: str, destination: Path, console: Console, variant: Variant) -> None:
    if not console.is_terminal:
        console.print(f"making checkpoint {tag}: fine-tuning for {STEPS} steps, then NVFP4")
    columns = (TextColumn("{task.description:<40}", markup=False), BarColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    with bar:
        model, tokenizer = _tuned(tag, destination.parent, bar)
        exporting = bar.add_task(f"checkpoint {tag}: to NVFP4", total=1)
        with quiet():
            model = variant.convert(model)
        quantize_to_nvfp4(model.to(torch.bfloat16), tokenizer, destination)
        bar.advance(exporting)


def _tuned(tag: str, cache: Path, bar: Progress) -> tuple[Any, Any]:
    """(the fine-tuned model in float32, tokenizer); kept in bf16, because every variant starts from it."""
    path = cache / f"smollm2-135m-tuned-{tag.lower()}"
    if not _kept(path, RECIPE):
        with _making(path, RECIPE):
            loading = bar.add_task(f"checkpoint {tag}: SmolLM2-135M-Instruct", total=1)
            model, tokenizer = load_base()
            bar.advance(loading)
            tuning = bar.add_task(f"checkpoint {tag}: fine-tune, {STEPS} steps", total=STEPS)
            finetune(model, tokenizer, tag, on_step=lambda: bar.advance(tuning))
            if tag == "B":
                reparametrize(model)
            with quiet():
                model.to(torch.bfloat16).save_pretrained(path)
                tokenizer.save_pretrained(path)
    with quiet():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return model.eval(), AutoTokenizer.from_pretrained(path)


def _kept(path: Path, recipe: str) -> bool:
    stamp = path.with_suffix(".stamp")
    return stamp.is_file() and stamp.read_text() == recipe and path.is_dir()


@contextmanager
def _making(path: Path, recipe: str) -> Iterator[None]:
    """A folder counts as made when its stamp is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stamp = path.with_suffix(".stamp")
    stamp.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
    yield
    stamp.write_text(recipe)
