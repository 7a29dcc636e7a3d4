"""Pages with code run as written."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize(
    ("page", "blocks"), [("tutorial.md", 4), ("pwal.md", 5), ("layouts.md", 5), ("seeing.md", 4), ("own-method.md", 5)]
)
def test_the_page_runs_as_written(page: str, blocks: int) -> None:
    found = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert len(found) == blocks

    exec(compile("\n".join(found), page, "exec"), {"__name__": "page"})


PAGES = [p for p in (*DOCS.rglob("*.md"), *DOCS.parent.glob("*.md")) if "```python" in p.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_parse_and_import_what_there_is(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("aliasparam"):
                module = importlib.import_module(node.module)
                assert [name.name for name in node.names if not hasattr(module, name.name)] == []


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


def test_the_tables_of_layouts_are_the_layouts() -> None:
    from .nvfp4.layout_table import PAGE, TABLES

    text = PAGE.read_text()
    assert [name for name, render in TABLES.items() if render() not in text] == []


def test_the_pictures_are_what_their_script_draws() -> None:
    from tools.pictures import FOLDER, PICTURES

    assert [name for name, draw in PICTURES.items() if (FOLDER / name).read_text() != draw()] == []


def test_the_taxonomy_of_failures_names_tests_that_there_are() -> None:
    rows = (DOCS / "reload.md").read_text().partition("### How it fails")[2]
    named = re.findall(r"`(test_\w+(?:\.py)?)`", rows)
    files = {path.name: path.read_text() for path in (DOCS.parent / "tests").rglob("test_*.py")}
    found = "\n".join(files.values())
    assert len(named) >= 15
    assert [name for name in named if name not in files and f"def {name}(" not in found] == []
