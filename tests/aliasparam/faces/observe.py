"""What a face does in a state: "right", or which error refuses it. Anything else is an AssertionError."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aliasparam import State, SwapHalves, process

from .catalog import FACES, INVALIDATES, Face
from .layers import COMPILED, STATES, Declared, Plain, complete, in_state, storage_of

DOCS = Path(__file__).parents[3] / "docs" / "faces.md"
_BEGIN, _END = "<!-- faces: begin -->", "<!-- faces: end -->"


def outcome(title: str, face: Face, state: str, device: torch.device) -> str:
    layer, plain = in_state(state, device, compiled="compiled before" in title), Plain(device)
    COMPILED[plain] = plain
    address = layer.weight.data_ptr()
    held = storage_of(layer)
    before = _digest(held)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = face(layer)
        except Exception as error:
            assert str(error), "a refusal without a message"
            after = _digest(held)
            assert after == before or (title in INVALIDATES and held.state is State.INVALID), f"refused, but changed: {after}"
            return f"refuses: {type(error).__name__}"
        expected = face(plain)
    _assert_right(layer, plain, found, expected)
    assert layer.weight.data_ptr() == address, "the address moved"
    return "right"


def _assert_right(layer: Declared, plain: Plain, found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert torch.equal(found.cpu(), expected.cpu()), f"silently wrong: {found} instead of {expected}"
    complete(layer)
    assert torch.equal(layer.weight, plain.weight), "what was written reads back otherwise"
    process(layer)
    assert torch.equal(layer.prepare(), SwapHalves().forward(plain.weight.data)), "the kernel name did not follow"
    assert torch.equal(layer(torch.ones(1, device=plain.weight.device)), plain(torch.ones(1, device=plain.weight.device)))


def _digest(storage: Any) -> Any:
    return storage.state, storage.buffer.data_ptr(), storage.buffer.tolist()


def table() -> dict[tuple[str, str, str], str]:
    """(group, face, state) to what the docs say."""
    rows: dict[tuple[str, str, str], str] = {}
    group = ""
    for line in DOCS.read_text().splitlines():
        if line.startswith("### "):
            group = line[4:]
        cells = [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 1 + len(STATES) and cells[0] != "face" and not set(cells[0]) <= {"-", ":"}:
            for state, cell in zip(STATES, cells[1:], strict=True):
                rows[group, cells[0], state] = cell
    return rows


def render(device: torch.device) -> str:
    lines: list[str] = []
    for group, faces in FACES.items():
        lines += [f"\n### {group}\n", f"| face | {' | '.join(STATES)} |", "|---" * (1 + len(STATES)) + "|"]
        for title, face in faces.items():
            lines.append(f"| {title} | {' | '.join(outcome(title, face, state, device) for state in STATES)} |")
    return "\n".join(lines) + "\n"


def write_docs() -> None:
    """``python -m tests.aliasparam.faces.observe``: observe everything and write the table."""
    text = DOCS.read_text()
    head, _, rest = text.partition(_BEGIN)
    _, _, tail = rest.partition(_END)
    DOCS.write_text(f"{head}{_BEGIN}\n{render(torch.device('cpu'))}\n{_END}{tail}")


if __name__ == "__main__":
    write_docs()
