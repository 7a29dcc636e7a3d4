"""Memory of every layer as a picture: one copy against two."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from aliasparam.errors import AliasError
from aliasparam.report.bars import Bar, bars

from .output import mib
from .rank_memory import Part

FORMATS = ("svg", "png", "pdf")


def need_format(out: Path) -> None:
    """Raise AliasError for a file that could not be written as a picture, before any work."""
    from ..demo._quiet import need

    if out.is_dir() or not out.absolute().parent.is_dir():
        raise AliasError("the picture cannot be written", name=str(out), expected="a file in a folder that exists")
    if out.suffix.removeprefix(".").lower() not in FORMATS:
        raise AliasError("unknown kind of picture", name=str(out), expected=f"a file name in {', '.join(FORMATS)}")
    need("matplotlib", extra="pictures")


def draw(parts: Sequence[Part], title: str, out: Path) -> None:
    """Write bars, one a layer: what is allocated, and above it what a second copy would add.

    Raises:
        OSError: the file cannot be written; nothing is left of it then.
    """
    layers = sorted({part.layer for part in parts if part.layer is not None})
    one = [sum(p.one_copy for p in parts if p.layer == layer) for layer in layers]
    extra = [sum(p.two_copies - p.one_copy for p in parts if p.layer == layer) for layer in layers]
    shown = [
        Bar(f"one copy: {mib(sum(one))}", "#2a78b8", one),
        Bar(f"what a second copy adds: {mib(sum(extra))}", "#d9d9d9", extra),
    ]
    _write(out, bars([str(layer) for layer in layers], shown, title=title, kind=out.suffix.removeprefix(".").lower()))


def _write(out: Path, content: bytes) -> None:
    """Whole or not at all: written beside, then renamed."""
    handle, name = tempfile.mkstemp(dir=out.absolute().parent, prefix=f".{out.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, out)
    except BaseException:
        os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
