"""Every test can fail: faults are planted in a copy of the packages, and each must be caught by the test file named for it.

``python -m tests.plant`` plants all, ``python -m tests.plant 3 7`` some. The copy is in a temporary folder; the tests run on it
by its place on the path.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .planted_faults import FAULTS, Planted

ROOT = Path(__file__).parents[1]


def caught(fault: Planted) -> str | None:
    """Plant the fault in a copy and run its tests: None where they fail, else what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("aliasparam", "aliasparam_nvfp4", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "pytest_aliasparam.py"):
            shutil.copy(ROOT / name, copy / name)
        shutil.copytree(ROOT / "docs", copy / "docs")
        file = copy / fault.of / fault.file
        text = file.read_text()
        if text.count(fault.old) < 1:
            return "the text it replaces is not there"
        file.write_text(text.replace(fault.old, fault.new))
        below = fault.of.removeprefix("aliasparam_")
        tests = [f"tests/{below}/{name}" for name in fault.tests.split()]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", *tests]
        environment = {**os.environ, "PYTHONPATH": str(copy), "HYPOTHESIS_PROFILE": "planted"}
        run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        return None if run.returncode == 1 else f"not caught (pytest ended with {run.returncode}): {run.stdout[-300:]}"


def main(chosen: list[int]) -> int:
    missed = 0
    for number, fault in enumerate(FAULTS):
        if chosen and number not in chosen:
            continue
        start = time.monotonic()
        wrong = caught(fault)
        missed += wrong is not None
        print(f"{number:3} {time.monotonic() - start:5.0f} s  {fault.file}: {wrong or f'caught by {fault.tests}'}", flush=True)
    print(f"{missed} not caught")
    return missed


if __name__ == "__main__":
    sys.exit(main([int(number) for number in sys.argv[1:]]))
