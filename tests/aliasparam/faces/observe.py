"""What a face does in a state: "right", or which error refuses it. Anything else is an AssertionError."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aliasparam import State, process

from .catalog import FACES, INVALIDATES, KINDS, PREPARED, UNSEEN, Face
from .layers import STATES, Declared, Plain, come_to, complete, storage_of

DOCS = Path(__file__).parents[3] / "docs" / "faces.md"
_BEGIN, _END = "<!-- faces: begin -->", "<!-- faces: end -->"


class SilentlyWrong(AssertionError):
    """Neither right nor refused."""


def outcome(group: str, title: str, state: str, device: torch.device) -> str:
    face = FACES[group][title]
    layer, plain = Declared(device, KINDS[group]), Plain(device, KINDS[group])
    if title in PREPARED:
        torch._dynamo.reset()
        PREPARED[title](layer)
        PREPARED[title](plain)
    come_to(layer, state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _outcome(title, face, layer, plain)
        except SilentlyWrong:
            if title not in UNSEEN:
                raise
            return "not seen"


def _outcome(title: str, face: Face, layer: Declared, plain: Plain) -> str:
    address, held = layer.weight.data_ptr(), storage_of(layer)
    before = _digest(held)
    try:
        found = face(layer)
    except (AssertionError, ImportError):  # what is not installed refuses nothing
        raise
    except Exception as error:
        assert str(error), "a refusal without a message"
        after = _digest(held)
        assert after == before or (title in INVALIDATES and held.state is State.INVALID), f"refused, but changed: {after}"
        return f"refuses: {type(error).__name__}"
    expected = face(plain)
    _need_right(layer, plain, found, expected)
    assert layer.weight.data_ptr() == address, "the address moved"
    return "right"


def _need_right(layer: Declared, plain: Plain, found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        _need(torch.equal(found.cpu(), expected.cpu()), f"{found} instead of {expected}")
    complete(layer)
    _need(torch.equal(layer.weight, plain.weight), "what was written reads back otherwise")
    process(layer)
    _need(torch.equal(layer.prepare(), plain.prepare()), "the kernel name did not follow")
    x = torch.ones(1, device=plain.weight.device)
    _need(torch.equal(layer(x), plain(x)), "the forward did not follow")


def _need(held: bool, what: str) -> None:
    if not held:
        raise SilentlyWrong(f"silently wrong: {what}")


def _digest(storage: Any) -> Any:
    return list(storage.states.each), storage.buffer.data_ptr(), storage.buffer.tolist()


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
        for title in faces:
            lines.append(f"| {title} | {' | '.join(outcome(group, title, state, device) for state in STATES)} |")
    return "\n".join(lines) + "\n"


def write_docs() -> None:
    """``python -m tests.aliasparam.faces.observe``: observe everything and write the table."""
    text = DOCS.read_text()
    head, _, rest = text.partition(_BEGIN)
    _, _, tail = rest.partition(_END)
    DOCS.write_text(f"{head}{_BEGIN}\n{render(torch.device('cpu'))}\n{_END}{tail}")


if __name__ == "__main__":
    write_docs()
