"""Folders that several files of tests read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .moe_models import by_modelopt


@pytest.fixture(scope="session")
def moe_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(kind, seed) to a folder by ModelOpt; made when it is asked for."""
    made: dict[tuple[str, int], Path] = {}

    def folder(kind: str, seed: int = 0) -> Path:
        if (kind, seed) not in made:
            made[kind, seed] = by_modelopt(tmp_path_factory.mktemp(f"{kind}-{seed}"), kind, seed)
        return made[kind, seed]

    return folder
