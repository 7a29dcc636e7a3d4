"""Arguments that several commands have."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

import typer

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def existing(value: str) -> Path:
    """The folder ``value``, looked at before anything heavy is imported.

    Raises:
        CheckpointError: there is none; of a model's name on the Hub it says how to get the folder.
    """
    if value and os.path.exists(value):
        return Path(value)
    from ..checkpoint import CheckpointError

    remedy = None
    if _HUB_ID.fullmatch(value) and not os.path.exists(value.partition("/")[0]):
        name = value.partition("/")[2]
        remedy = f"For a model on the Hugging Face Hub download it first: hf download {value} --local-dir {name}"
    if os.path.islink(value):
        raise CheckpointError("this link leads nowhere", name=value, expected="a folder", found=f"a link to {os.readlink(value)}")
    raise CheckpointError("there is no such folder", name=value or "''", expected="a model folder", remedy=remedy)


Folder = Annotated[Path, typer.Argument(help="An NVFP4 checkpoint folder.", parser=existing, metavar="FOLDER")]
Backend = Annotated[str, typer.Option(help="Linear backend, or auto.")]
Runner = Annotated[str, typer.Option("--moe-backend", help="MoE runner, or auto.")]
Tokens = Annotated[int, typer.Option(min=1, help="New tokens at most.")]
Missing = Annotated[
    str,
    typer.Option(
        "--missing-input-scale",
        help="Layers and experts without an input scale: refuse them; max (the largest of the layer); dynamic (computed for each "
        "token) or dynamic-tensor (for each call), where the backend can.",
        metavar="POLICY",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def need_backends(backend: str, moe_backend: str, missing: str = "refuse") -> None:
    """Unknown names fail before anything is read.

    Raises:
        BackendError: no such linear backend, or no such MoE runner.
        ScaleError: no such policy for missing input scales.
    """
    from ..linear.backends import linear_backend
    from ..moe.runners import moe_runner
    from ..quantize.missing import need_policy

    need_policy(missing)
    linear_backend(backend)
    moe_runner(moe_backend)
