"""Reads of files that fail, and a folder read into a session."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aliasparam.reload import held_file
from aliasparam.reload.session import ReloadSession
from aliasparam.reload.sources import SafetensorsFolder


@contextlib.contextmanager
def failing_read(at: int, how: str) -> Iterator[list[int]]:
    """The read number ``at`` of any file fails, or finds the file's end; yields [reads so far]."""
    real, count = os.preadv, [0]

    def preadv(*arguments: Any) -> int:
        count[0] += 1
        if count[0] - 1 == at:
            if how == "end":
                return 0
            raise OSError(5, "Input/output error")
        return real(*arguments)

    held_file.os.preadv = preadv  # type: ignore[attr-defined,assignment]
    try:
        yield count
    finally:
        held_file.os.preadv = real  # type: ignore[attr-defined]


def read_all(session: ReloadSession, folder: Path) -> None:
    with SafetensorsFolder(folder) as opened:
        for name in opened.tensors:
            session.update(name, opened.read(name))
        opened.check_unchanged()
