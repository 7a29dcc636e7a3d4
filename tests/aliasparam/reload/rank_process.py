"""One rank as a process that may kill itself at a given point; what it serves is a file."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from aliasparam.reload.errors import RanksError
from aliasparam.reload.ranks_store import Ranks


class FileMember:
    """Weights are a word in a file; the old word is kept in memory until it may be forgotten."""

    def __init__(self, path: Path, die_at: str | None) -> None:
        self.path, self.die_at = path, die_at
        self.path.write_text("old")

    def _point(self, name: str) -> None:
        if name == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def prepare(self) -> str:
        self._point("prepare")
        return "token"

    def commit(self) -> None:
        self._point("commit")
        self.path.write_text("refuses")
        self._point("committed")

    def keep(self) -> None:
        self._point("keep")
        self.path.write_text("new")

    def revert(self) -> None:
        self._point("revert")
        self.path.write_text("old")


class DyingStore:
    """A store whose client dies after (or before) it has set a key that ends so."""

    def __init__(self, store: TCPStore, die_at: str | None) -> None:
        self._store, self._die_at = store, die_at or " "

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def compare_set(self, key: str, standing: str, value: str) -> bytes:
        before, _, end = self._die_at.partition(" ")
        if before == "before" and end in key:
            os.kill(os.getpid(), signal.SIGKILL)
        found = self._store.compare_set(key, standing, value)
        if before == "after" and end in key:
            os.kill(os.getpid(), signal.SIGKILL)
        return found


def ranks_of(port: int, group: str, rank: int, ranks: int, die_at: str | None, seconds: float) -> Ranks:
    store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
    return Ranks(DyingStore(store, die_at), rank, ranks, group=group, ready_seconds=seconds, done_seconds=seconds, patience=30)


def run(port: int, group: str, rank: int, ranks: int, path: str, die_at: str | None, seconds: float) -> None:
    """``seconds``: how long it waits for the votes of others."""
    member, end = FileMember(Path(path), die_at), ranks_of(port, group, rank, ranks, die_at, seconds)
    start = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
    start.set(f"{group}/here/{rank}", "")
    start.wait([f"{group}/here/{other}" for other in range(ranks)])  # so that deadlines are of the protocol alone
    try:
        end.change(member, "old", "new", 1)
    except RanksError as error:
        Path(path + ".error").write_text(str(error))


def restart(port: int, group: str, rank: int, ranks: int, path: str) -> None:
    Path(path).write_text(ranks_of(port, group, rank, ranks, None, 5).generation_to_load() or "old")
