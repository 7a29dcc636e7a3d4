"""The RL loop as two processes: a trainer that fine-tunes, quantizes and streams, a server that answers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aliasparam_nvfp4.demo.finetune import expected_text

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.real
def test_law_9_the_server_answers_as_the_trainer_taught_it(checkpoints: tuple[Path, Path]) -> None:
    a, b = checkpoints
    tuned = b.with_name("smollm2-135m-tuned-b")
    command = [sys.executable, "examples/rl_loop.py", "--serving", str(a), "--start", str(tuned), "--steps", "1"]
    ran = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    said = [line for line in ran.stdout.splitlines() if line.startswith(("server", "trainer: the"))]
    assert said == [
        f"server, checkpoint A: {expected_text('A')}",
        f"server, while weights arrive: {expected_text('A')}",
        f"server, after the stream: {expected_text('B')}",
        "trainer: the server's digest is mine after the stream",
        f"server, after the delta to version 2: {expected_text('B')}",
        "trainer: the server's digest is mine after the delta",
    ], ran.stdout
    assert "of 902 tensors changed" in ran.stdout and " 0 of 902" not in ran.stdout
