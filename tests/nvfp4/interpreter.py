"""Running a test module in Triton's interpreter: in a process of its own, because Triton looks at the environment once."""

from __future__ import annotations

import os
import subprocess
import sys


def interpreted(module: str, *arguments: str, options: tuple[str, ...] = ()) -> str:
    """What ``python -m module`` prints there; it must succeed."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *options, "-m", module, *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout
