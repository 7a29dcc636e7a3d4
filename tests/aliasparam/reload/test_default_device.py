"""Host memory is on the host, whatever device is torch's default: engines load within ``torch.device("cuda")`` (law 1)."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import aliasparam
from aliasparam import Layout, apply_delta, checkpoint_digest, checkpoint_state_dict, process, reload
from aliasparam.layout import IndexLayout, OpaqueLayout
from aliasparam.reload import digest_of_folder
from aliasparam.reload.delta_writer import diff
from aliasparam.reload.policies import PolicyName
from aliasparam.reload.sources import SafetensorsFolder

from ..small import INTERLEAVE, SWAP, bytes_of, kernel, layer_of
from .live_models import Whole, changed, folder_of, raw

OLD = checkpoint_state_dict(Whole())
NEW = changed(changed(OLD, 0.1, 0), 0.1, 1)


@pytest.mark.parametrize("policy", get_args(PolicyName))
def test_law_1_a_reload_under_another_default_device(policy: PolicyName, tmp_path: Path) -> None:
    model, files = Whole(), folder_of(tmp_path / "new", NEW)
    with torch.device("meta"), SafetensorsFolder(files) as folder:
        with reload(model, policy=policy) as session:
            session.load((name, folder.read(name)) for name in folder.tensors)
        assert checkpoint_digest(model) == digest_of_folder(files)
        again = reload(model, policy=policy)
        again.begin()
        again.load(OLD)
        again.prepare()
        again.switch()
        again.abort() if policy.endswith("journal") else again.commit()
    assert raw(checkpoint_state_dict(model)) == raw(NEW if policy.endswith("journal") else OLD)


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_law_12_a_delta_under_another_default_device(encoding: str, tmp_path: Path) -> None:
    model, files = Whole(), folder_of(tmp_path / "new", NEW)
    with torch.device("meta"), SafetensorsFolder(files) as folder:
        diff(OLD, folder, tmp_path / "delta", 1, 0, encoding=encoding)
        assert apply_delta(model, tmp_path / "delta") == 1
    assert raw(checkpoint_state_dict(model)) == raw(NEW)


def reversed_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[torch.arange(tensor.shape[0] - 1, -1, -1)]


LAYOUTS: dict[str, Any] = {
    "a line": lambda: SWAP,
    "a function": lambda: reversed_rows,
    "a table": lambda: IndexLayout(torch.arange(48, device="cpu").flip(0).view(6, 8)),
    "two functions": lambda: OpaqueLayout(lambda t: t.flip(0), lambda t: t.flip(0)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_law_1_declared_and_written_in_part_under_another_default_device(layout: str) -> None:
    values = bytes_of(6, 8)
    weight = torch.empty(6, 8, dtype=torch.uint8)
    with torch.device("meta"):
        layer = layer_of(weight, LAYOUTS[layout](), loaded=False)
        layer.weight.view(-1)[:9].copy_(values.view(-1)[:9])
        assert torch.equal(layer.weight.view(-1)[:9].clone(), values.view(-1)[:9])
        layer.weight.view(-1)[9:].copy_(values.view(-1)[9:])
        process(layer)
    assert torch.equal(layer.weight.clone(), values)


def test_a_tile_is_drawn_and_an_oracle_made_under_another_default_device() -> None:
    with torch.device("meta"):
        found = Layout(INTERLEAVE)._repr_html_(), Layout(INTERLEAVE).bind((6, 8), torch.uint8).offsets()
    assert found[0] == Layout(INTERLEAVE)._repr_html_()
    assert torch.equal(kernel(INTERLEAVE, bytes_of(6, 8)).view(-1)[found[1]], bytes_of(6, 8))


MAKES = {
    *("arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "ones"),
    *("rand", "randint", "randn", "randperm", "tensor", "zeros"),
}
#: Run on the host as a whole, by ``infer``.
INSIDE = ("layout/trace.py", "layout/infer.py")


def test_whatever_the_core_makes_says_its_device() -> None:
    library = Path(aliasparam.__file__).parent
    silent = [
        f"{file.relative_to(library)}:{call.lineno}"
        for file in library.rglob("*.py")
        if "testing" not in file.parts and not str(file).endswith(INSIDE)
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in MAKES
        if isinstance(call.func.value, ast.Name) and call.func.value.id == "torch"
        if not any(keyword.arg == "device" for keyword in call.keywords)
    ]
    assert not silent
