"""Pages with code run as written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize(("page", "blocks"), [("tutorial.md", 4), ("pwal.md", 5)])
def test_the_page_runs_as_written(page: str, blocks: int) -> None:
    found = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert len(found) == blocks

    exec(compile("\n".join(found), page, "exec"), {"__name__": "page"})


def test_the_backends_table_is_the_backends() -> None:
    from .nvfp4.proof_table import DOCS as PAGE
    from .nvfp4.proof_table import render

    assert render() in PAGE.read_text()


def test_the_runners_table_is_the_runners() -> None:
    from .nvfp4.proof_table import MOE_DOCS, render_moe

    assert render_moe() in MOE_DOCS.read_text()


def test_the_activations_table_is_the_runners() -> None:
    from .nvfp4.proof_table import MOE_DOCS, render_activations

    assert render_activations() in MOE_DOCS.read_text()
