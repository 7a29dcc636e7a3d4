"""``aliasparam-nvfp4 verify --engine vllm``, on a CPU."""

from __future__ import annotations

from pathlib import Path

from aliasparam_nvfp4.cli.verify_engine import accept

from . import engine as engine  # its environment; skips without vLLM


def test_a_reloaded_engine_decodes_the_same_logprobs(moe: tuple[Path, Path]) -> None:
    a, b = moe

    found = accept("vllm", a, b, 1, {"enforce_eager": True, "dtype": "bfloat16", "disable_log_stats": True})

    assert found["held"], found
    assert [row["apart"] for row in found["rows"] if row["loaded"] != str(b)] == [0.0] * 4
