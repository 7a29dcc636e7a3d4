"""``demo``: a real model, reloaded A → B → A."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Backend, Runner, need_backends
from .output import say


def demo(
    cache: Annotated[Path | None, typer.Option(help="Where the two checkpoints are kept.")] = None,
    backend: Backend = "reference",
    moe: Annotated[bool, typer.Option("--moe", help="The same model as a mixture of experts, 2 of 4 for each token.")] = False,
    moe_backend: Runner = "reference",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Every proof, and the memory of every name.")] = False,
) -> None:
    """Serve a real model, reload it A → B → A, and prove every promise. Exit code 1 if a proof fails."""
    say("A 135M model is served in NVFP4 and reloaded A → B → A: half a minute, and some minutes the first time.")
    need_backends(backend, moe_backend)
    from ..demo._quiet import need

    need("gguf", "transformers", "accelerate")
    from ..demo.checkpoints import default_cache
    from ..demo.run import Demo
    from ..demo.split import DENSE, MIXTRAL_4
    from .output import console

    variant = MIXTRAL_4 if moe else DENSE
    run = Demo(cache or default_cache(), console(), backend, variant=variant, moe_backend=moe_backend, verbose=verbose)
    if not run.run():
        raise typer.Exit(1)
