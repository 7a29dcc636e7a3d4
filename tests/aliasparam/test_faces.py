"""Every face in every state is what the table in docs/faces.md says, and never silently wrong."""

from __future__ import annotations

import pytest
import torch

from .faces.catalog import FACES, UNSEEN
from .faces.layers import STATES
from .faces.observe import DOCS, outcome, table

CASES = [(group, title, state) for group, faces in FACES.items() for title in faces for state in STATES]
#: numpy has no memory on a GPU, CUDA handles cannot be opened by the process that made them, and integers have no matmul there.
CPU_ONLY = {
    "`F.linear` with the name as weight",
    "`.numpy()` (a read-only copy)",
    "`numpy.asarray`",
    "the name sent to another process",
}
#: What a face needs beside torch and numpy.
NEEDS = {"DLPack: the name as an argument of a tvm-ffi function": "tvm_ffi"}
#: The table is of this version; torch's own refusals are of other classes in others, and on a GPU.
EXACT = torch.__version__.startswith("2.13.")


@pytest.mark.parametrize(("group", "title", "state"), CASES, ids=[f"{t}-{s}" for _, t, s in CASES])
def test_law_1_and_8_a_face_is_right_or_refuses(group: str, title: str, state: str, device: torch.device) -> None:
    if device.type == "cuda" and title in CPU_ONLY:
        pytest.skip("a face of the CPU")
    if title in NEEDS:
        pytest.importorskip(NEEDS[title])

    found, expected = outcome(group, title, state, device), table()[group, title, state]

    if EXACT and device.type == "cpu":
        assert found == expected
    assert found.partition(":")[0] == expected.partition(":")[0]


def test_what_is_not_seen_is_named_in_the_docs_and_is_no_more_than_that() -> None:
    unseen = {title for (_, title, _), outcome in table().items() if outcome == "not seen"}

    assert unseen == UNSEEN
    head = DOCS.read_text().partition("## The table")[0]
    for words in ("to_dlpack", "other.data = name", "kernel_name.data.fill_"):
        assert words in head


def test_the_table_lists_every_face_and_no_other() -> None:
    assert set(table()) == set(CASES)
