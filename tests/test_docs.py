"""The tutorial runs as written."""

from __future__ import annotations

import re
from pathlib import Path

TUTORIAL = Path(__file__).parent.parent / "docs" / "tutorial.md"


def test_the_tutorial_runs_as_written() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TUTORIAL.read_text(), re.DOTALL)
    assert len(blocks) == 3

    exec(compile("\n".join(blocks), str(TUTORIAL), "exec"), {"__name__": "tutorial"})
