"""Every face in every state is what the table in docs/faces.md says, and never silently wrong."""

from __future__ import annotations

import pytest
import torch

from .faces.catalog import FACES
from .faces.layers import STATES
from .faces.observe import outcome, table

CASES = [(group, title, state) for group, faces in FACES.items() for title in faces for state in STATES]
#: numpy has no memory on a GPU; and only the GPU has a CUDA array interface to refuse or a plain one to give.
CPU_ONLY = {"`.numpy()` (a read-only copy)", "`numpy.asarray`"}


@pytest.mark.parametrize(("group", "title", "state"), CASES, ids=[f"{t}-{s}" for _, t, s in CASES])
def test_law_1_and_8_a_face_is_right_or_refuses(group: str, title: str, state: str, device: torch.device) -> None:
    if device.type == "cuda" and title in CPU_ONLY:
        pytest.skip("a face of the CPU")

    assert outcome(title, FACES[group][title], state, device) == table()[group, title, state]


def test_the_table_lists_every_face_and_no_other() -> None:
    assert set(table()) == set(CASES)
