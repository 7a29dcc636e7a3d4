"""``generate``: one prompt, one answer."""

from __future__ import annotations

from typing import Annotated

import typer

from .models import ask_aloud, load
from .options import Backend, Folder, Missing, Runner, Tokens


def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(help="The question.", metavar="PROMPT")],
    backend: Backend = "auto",
    moe_backend: Runner = "auto",
    missing_input_scale: Missing = "refuse",
    tokens: Tokens = 64,
) -> None:
    """Answer one prompt, greedily, as it comes."""
    model, tokenizer = load(folder, backend, moe_backend, missing_input_scale)
    ask_aloud(model, tokenizer, prompt, tokens)
