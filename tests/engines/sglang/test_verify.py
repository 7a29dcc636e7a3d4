"""``aliasparam-nvfp4 verify --engine sglang``, on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("sglang", reason="SGLang is not installed: make test-sglang")

from aliasparam_nvfp4.cli.verify_engine import accept

from .folders import moe
from .runner import CPU


def test_a_reloaded_engine_decodes_the_same_logprobs(tmp_path: Path) -> None:
    a, b = moe(tmp_path / "a", 0), moe(tmp_path / "b", 1)

    found = accept("sglang", a, b, 1, CPU)

    assert found["held"], found
    assert [row["apart"] for row in found["rows"] if row["loaded"] != str(b)] == [0.0] * 4
