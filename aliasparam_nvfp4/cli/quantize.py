"""``quantize``: a bf16 folder to NVFP4."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .options import existing
from .output import progress, say


def quantize(
    model: Annotated[
        Path, typer.Argument(help="A transformers causal-LM folder in bf16, fp16 or fp32.", parser=existing, metavar="MODEL")
    ],
    out: Annotated[Path, typer.Argument(help="The NVFP4 folder to write; must not exist.", metavar="OUT")],
) -> None:
    """Quantize a model to NVFP4 with ModelOpt, on the CPU."""
    from aliasparam.errors import AliasError

    if os.path.lexists(out):
        raise AliasError("the output exists", name=str(out), remedy="Choose another folder or remove it.")
    from ..demo._quiet import need, quiet

    need("transformers", "accelerate", "modelopt", extra="quantize")
    with progress() as bar:
        bar.add_task(f"quantizing {model}", total=None)
        with quiet():
            from .modelopt import load_unquantized, made_whole
            from .modelopt import quantize as by_modelopt

            with made_whole(out) as unfinished:  # first, so that a place that cannot be written fails at once
                by_modelopt(*load_unquantized(model), unfinished)
    say(f"written: {out}")
