"""What the docs list is what there is."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

import aliasparam
import aliasparam.testing
from aliasparam import State
from aliasparam.testing import LAWS

DOCS = Path(__file__).parents[2] / "docs"


def public(module: ModuleType) -> set[str]:
    return {
        f"{module.__name__}.{name}"
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "annotations" and not isinstance(value, ModuleType)
    }


def test_the_state_diagram_names_every_state() -> None:
    text = (DOCS / "concepts.md").read_text()

    assert all(state.name in text for state in State)


@pytest.mark.parametrize("module", [aliasparam, aliasparam.testing], ids=lambda module: module.__name__)
def test_the_reference_lists_every_public_name_and_no_other(module: ModuleType) -> None:
    listed = re.findall(r"^::: (\S+)$", (DOCS / "reference" / "aliasparam.md").read_text(), re.MULTILINE)
    here = [name for name in listed if name.rpartition(".")[0] == module.__name__ and name != "aliasparam.errors"]

    assert sorted(here) == sorted(public(module))
    assert "aliasparam.errors" in listed


@pytest.mark.parametrize("page", ["concepts.md", "testing.md"])
def test_the_pages_name_every_law(page: str) -> None:
    text = (DOCS / page).read_text().lower()

    for number, law in LAWS.items():
        name = law.partition(":")[0].lower()
        alike = [name, name.replace(" = ", " is ")]
        assert any(f"{number} {a}" in text or f"{number}. *{a}*" in text for a in alike), (number, law)
