"""``verify``: a kernel against its emulator on this machine; or what serves against a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from json import loads
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import AsJson, existing
from .output import say, say_json


def verify(
    backend: Annotated[str, typer.Option(help="Linear backend or MoE runner to accept, or auto.")] = "auto",
    moe: Annotated[bool, typer.Option("--moe", help="An MoE runner, not a linear backend.")] = False,
    folder: Annotated[Path | None, typer.Option(help="Instead: does this folder serve?", parser=existing, metavar="B")] = None,
    server: Annotated[str | None, typer.Option(help="With --folder: whose /digest to ask, such as http://HOST:PORT.")] = None,
    digest: Annotated[str, typer.Option(help="With --folder: adler32, xxh3-128 or blake3.")] = "adler32",
    engine: Annotated[str | None, typer.Option(help="Instead: vllm or sglang, with --model.")] = None,
    model: Annotated[Path | None, typer.Option(help="With --engine: a folder.", parser=existing, metavar="A")] = None,
    other: Annotated[
        Path | None, typer.Option(help="With --engine: another to load between.", parser=existing, metavar="B")
    ] = None,
    tp: Annotated[int, typer.Option(help="With --engine: tensor-parallel ranks.", min=1)] = 1,
    engine_option: Annotated[
        list[str] | None, typer.Option(help="With --engine: an argument of the engine, its value as JSON.", metavar="NAME=VALUE")
    ] = None,
    json: AsJson = False,
) -> None:
    """Run a kernel against its emulator on this machine's GPU (or CPU); or compare what serves with a folder; or reload a real
    engine from disk, twice, and compare what it decodes.

    Exit code 1 if a shape is wrong, a tensor differs or logprobs changed. Without --server the folder is loaded here.
    """
    _need("--folder", folder, {"--server": server})
    _need("--engine", engine, {"--model": model, "--other": other, "--engine-option": engine_option})
    if folder is not None and engine is not None:
        raise typer.BadParameter("--folder and --engine verify different things: choose one")
    if engine is not None:
        _verify_engine(engine, model, other, tp, engine_option or [], json=json)
        return
    if folder is not None:
        _verify_folder(folder, server, digest, json=json)
        return
    import torch

    from ..linear.backends import linear_backend
    from ..linear.verify import verify as run_linear
    from ..moe.runners import moe_runner
    from ..moe.verify import verify as run_moe

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


def _need(what: str, given: object, options: Mapping[str, object]) -> None:
    """Something else would be verified, and found right."""
    for option, value in options.items():
        if value and given is None:
            raise typer.BadParameter(f"{option} needs {what}")


def _verify_engine(name: str, model: Path | None, other: Path | None, tp: int, options: list[str], *, json: bool) -> None:
    from .verify_engine import accept

    if model is None:
        raise typer.BadParameter("--engine needs --model, a folder")
    found = accept(name, model, other, tp, dict(map(_option, options)))
    if json:
        say_json(found)
    else:
        for row in found["rows"]:
            apart = (
                "other tokens" if row["apart"] is None else f"logprobs {row['apart']:.3g} apart" if row["apart"] else "bit-equal"
            )
            say(f"{row['loaded']}: {apart}, {'right' if row['held'] else 'WRONG'}")
    if not found["held"]:
        raise typer.Exit(1)


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise typer.BadParameter(f"--engine-option {text}: not of the form NAME=VALUE")
    try:
        return name, loads(value)
    except ValueError:
        return name, value  # a plain word


def _verify_folder(folder: Path, server: str | None, digest: str, *, json: bool) -> None:
    from .verify_folder import compare

    found = compare(folder, server, digest)
    if json:
        say_json({"folder": str(folder), "server": server, **found})
    elif found["held"]:
        say(f"{server or 'the model loaded here'} holds {folder} bit for bit: {found['digest']}")
    elif not found["differing"] and found["otherwise"]:
        say(f"the bytes are those of {folder}, and {server} computes another thing with them:\n{found['otherwise']}")
    else:
        say(f"{len(found['differing'])} tensors differ: {', '.join(found['differing'][:5])}")
    if not found["held"]:
        raise typer.Exit(1)
