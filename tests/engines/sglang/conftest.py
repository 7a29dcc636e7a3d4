"""SGLang on a CPU: the packages that have no CPU build stand in from stub/, also in the engine's processes."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

STUB = str(Path(__file__).parent / "stub")
if importlib.util.find_spec("sglang") is not None:  # elsewhere a real torchvision may be missed
    sys.path.insert(0, STUB)
    os.environ["PYTHONPATH"] = os.pathsep.join([STUB, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ |= {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def dense_runner() -> Any:
    from sglang.srt.plugins import load_plugins

    from .dense import Dense
    from .folders import need_dense

    need_dense()
    load_plugins()
    return Dense()


@pytest.fixture
def dense(dense_runner: Any) -> Iterator[Any]:
    """Serves A, and does so again for the next test."""
    from aliasparam.errors import AliasError

    from .folders import DENSE

    yield dense_runner
    try:
        serving = dense_runner.serves("a")
    except AliasError:  # the stock updater left it half written
        serving = False
    if not serving:
        success, said = dense_runner.update(DENSE["a"])
        assert success and dense_runner.serves("a"), said
