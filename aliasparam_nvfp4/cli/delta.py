"""``delta``: what makes one checkpoint of another, as a folder that trainers and servers understand."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .guard import about, message_of
from .options import AsJson, existing
from .output import mib, say, say_json


class Encoding(StrEnum):
    xor = "xor"
    overwrite = "overwrite"


class Checksum(StrEnum):
    xxh3 = "xxh3-128"
    blake3 = "blake3"
    adler32 = "adler32"


def delta(
    a: Annotated[Path, typer.Argument(help="The checkpoint that serves.", parser=existing, metavar="A")],
    b: Annotated[Path, typer.Argument(help="The one that is to serve.", parser=existing, metavar="B")],
    out: Annotated[Path, typer.Argument(help="The folder to make, such as SOURCE/weight_v000001.", metavar="OUT")],
    version: Annotated[int, typer.Option(min=1, help="The version that B is.")] = 1,
    base_version: Annotated[int, typer.Option(min=0, help="The version that A is.")] = 0,
    encoding: Annotated[Encoding, typer.Option(help="How changes are written.")] = Encoding.xor,
    checksum: Annotated[Checksum, typer.Option(help="Of each tensor's new bytes.")] = Checksum.xxh3,
    json: AsJson = False,
) -> None:
    """Write the delta that makes checkpoint B of checkpoint A: XOR or (positions, bytes), zstd, a checksum a tensor."""
    from aliasparam.reload.delta_writer import diff
    from aliasparam.reload.sources import SafetensorsFolder

    with SafetensorsFolder(a) as old, SafetensorsFolder(b) as new, about(out):
        changed, tensors = diff(old, new, out, version, base_version, encoding=encoding.value, checksum_format=checksum.value)
        whole = sum(entry.nbytes for entry in new.tensors.values())
    size = sum(file.stat().st_size for file in out.iterdir())
    if json:
        say_json({"folder": str(out), "version": version, "changed": changed, "tensors": tensors, "bytes": size, "of": whole})
    else:
        say(f"{out}: {changed} of {tensors} tensors changed; {mib(size)} for a checkpoint of {mib(whole)}")


def delta_once(model: Any, folder: Path, serving: int | None) -> dict[str, Any]:
    """What applying a delta came to: ``folder``, ``error`` (or None), ``version`` and ``seconds``."""
    from aliasparam.errors import AliasError

    from ..integrations.transformers.delta import apply_delta_folder

    started, error, version = time.perf_counter(), None, serving
    try:
        version = apply_delta_folder(model, folder, serving=serving)
    except (AliasError, OSError) as refusal:
        error = message_of(refusal)
    return {"folder": str(folder), "error": error, "version": version, "seconds": time.perf_counter() - started}
