"""``reload``: one model, several folders, in place."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .guard import message_of
from .models import ask, ask_aloud, load
from .options import AsJson, Backend, Folder, Missing, Runner, Tokens, existing
from .output import progress, say, say_json


def reload(
    first: Folder,
    then: Annotated[list[Path], typer.Argument(help="Folders to reload from, in order.", parser=existing, metavar="THEN...")],
    prompt: Annotated[str, typer.Option(help="Asked after every load.")] = "What is the capital of France?",
    backend: Backend = "auto",
    moe_backend: Runner = "auto",
    missing_input_scale: Missing = "refuse",
    tokens: Tokens = 32,
    json: AsJson = False,
) -> None:
    """Load a model, then hot-reload it from other folders, asking the same question each time. Exit code 1 if one is refused."""
    model, tokenizer = load(first, backend, moe_backend, missing_input_scale)
    answered = ask if json else ask_aloud
    steps: list[dict[str, Any]] = [{"folder": str(first), "error": None}]
    steps[0]["answer"] = answered(model, tokenizer, prompt, tokens)
    for folder in then:
        step = reload_once(model, folder)
        if not json:
            say(f"refused {step['error']}" if step["error"] else f"reloaded {folder} in {step['seconds']:.2f} s")
        step["answer"] = answered(model, tokenizer, prompt, tokens)
        steps.append(step)
    if json:
        say_json({"prompt": prompt, "steps": steps})
    if any(step["error"] for step in steps):
        raise typer.Exit(1)


def reload_once(model: Any, folder: Path) -> dict[str, Any]:
    """What a reload came to: ``folder``, ``error`` (why it was refused or failed, or None), ``bytes`` read and ``seconds``."""
    from safetensors import SafetensorError

    from aliasparam.errors import AliasError

    from ..checkpoint import CheckpointFolder
    from ..integrations.transformers import reload_folder

    started, error, count = time.perf_counter(), None, 0
    try:
        total = sum(entry.nbytes for entry in CheckpointFolder(folder).tensors.values())
        with progress() as bar:
            task = bar.add_task(f"reloading {folder}", total=total)
            count = reload_folder(model, folder, on_bytes=lambda n: bar.advance(task, n))
    except (AliasError, OSError, SafetensorError) as refusal:
        error = message_of(refusal)
    return {"folder": str(folder), "error": error, "bytes": count, "seconds": time.perf_counter() - started}
