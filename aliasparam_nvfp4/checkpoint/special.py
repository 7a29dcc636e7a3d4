"""Files of a folder that are no files: a pipe would be waited for, and a device read without end."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .errors import CheckpointError


def need_plain_files(folder: Path) -> None:
    """Raise CheckpointError for a pipe, socket or device among the files of ``folder``, whoever would read it.

    Looks at each entry once, without opening it. What is not there, or cannot be looked at, is left to whoever reads it.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return
    for name in names:
        try:
            mode = os.stat(folder / name).st_mode
        except OSError:
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise CheckpointError(
                "this is not a file", name=str(folder / name), expected="a regular file, or a folder", found=_kind(mode)
            )


def _kind(mode: int) -> str:
    kinds = {stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}
    return next((kind for test, kind in kinds.items() if test(mode)), "something else")
