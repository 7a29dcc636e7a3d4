"""The commands, put together."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .delta import delta
from .demo import demo
from .doctor import doctor, version
from .generate import generate
from .inspect import inspect
from .output import say
from .quantize import quantize
from .reload import reload
from .retarget import retarget
from .serve import serve
from .verify import verify

PROGRAM = "aliasparam-nvfp4"

app = typer.Typer(
    name=PROGRAM,
    help="NVFP4 checkpoints: quantize, inspect, generate, serve, hot-reload and verify.",
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # plain text, which folds, and goes through pipes and ASCII terminals
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (demo, quantize, inspect, generate, serve, reload, retarget, delta, verify, doctor):
    app.command()(_command)


def _version(asked: bool) -> None:
    if asked:
        say(f"{PROGRAM} {version('aliasparam')}")
        raise typer.Exit


@app.callback()
def _options(
    show: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


def invoke() -> int:
    """Run what the command line says; its exit code. Exceptions pass through, to :func:`~.guard.guarded`."""
    command = typer.main.get_command(app)
    try:
        with command.make_context(PROGRAM, sys.argv[1:] or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as leave:
        return leave.exit_code
    return 0
