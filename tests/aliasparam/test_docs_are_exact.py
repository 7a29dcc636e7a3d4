"""What the docs list is what there is."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

import aliasparam
import aliasparam.testing
from aliasparam import State
from aliasparam.layout.layout import bound_to
from aliasparam.storage.coverage import Box
from aliasparam.storage.states import RegionStates
from aliasparam.testing import LAWS
from tools.pictures import FOLDER, MOVES

DOCS = Path(__file__).parents[2] / "docs"


def public(module: ModuleType) -> set[str]:
    return {
        f"{module.__name__}.{name}"
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "annotations" and not isinstance(value, ModuleType)
    }


def written(before: State, box: Box) -> State | None:
    """What a region of [2, 3] in this state is after a write of ``box``."""
    states = RegionStates(bound_to(None, (2, 3), torch.uint8), State.EMPTY if before is State.PARTIAL else before)
    if before is State.PARTIAL:
        states.arrived(((0, 1), (0, 3)), states.begin(((0, 1), (0, 3))))
    assert states.common is before
    states.arrived(box, states.begin(box))
    return states.common


def test_the_picture_of_states_is_what_a_write_does() -> None:
    part, whole = ((1, 2), (0, 2)), ((0, 2), (0, 3))
    moves = {(before, written(before, box)) for before in State for box in (part, whole)}

    changed = {(before.name, after.name) for before, after in moves if after is not None and before is not after}
    assert changed == {(before, after) for before, after, _ in MOVES}
    assert written(State.LOADED, part) is State.LOADED
    drawn, page = (FOLDER / "states.svg").read_text(), (DOCS / "concepts.md").read_text()
    assert all(state.name in drawn and f"| {state.name}: " in page for state in State)


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
