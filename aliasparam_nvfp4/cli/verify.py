"""``verify``: a kernel against its emulator, on this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from .options import AsJson
from .output import say, say_json


def verify(
    backend: Annotated[str, typer.Option(help="Linear backend or MoE runner to accept, or auto.")] = "auto",
    moe: Annotated[bool, typer.Option("--moe", help="An MoE runner, not a linear backend.")] = False,
    json: AsJson = False,
) -> None:
    """Run a kernel against its emulator on this machine's GPU (or CPU). Exit code 1 if any shape is wrong."""
    import torch

    from ..backends import linear_backend
    from ..moe.runners import moe_runner
    from ..moe.verify import verify as run_moe
    from ..verify import verify as run_linear

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen, run = (moe_runner(backend, device), run_moe) if moe else (linear_backend(backend, device), run_linear)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    if not json:
        say(f"{chosen.name} on {where}, torch {torch.__version__}")
        say(f"{'layer':<42}{'tokens':>7}  dB against the emulator")
    rows: list[dict[str, Any]] = []
    for verdict in run(chosen.name, device):
        rows.append(asdict(verdict))
        if not json:  # row by row, because a shape takes its time
            shown = verdict.detail or f"{verdict.decibel:.1f}"
            say(f"{verdict.shape:<42}{verdict.tokens or '':>7}  {shown:<10}{'right' if verdict.held else 'WRONG'}")
    held = all(row["held"] for row in rows)
    if json:
        say_json({"backend": chosen.name, "device": where, "torch": torch.__version__, "held": held, "rows": rows})
    if not held:
        raise typer.Exit(1)
