"""`retarget`: from one backend to another in place; the values, the addresses and the answer stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers")
from aliasparam.errors import AliasError
from aliasparam_nvfp4.cli.app import app

from .folders import chat_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("folders") / "a", 1)


def run(*arguments: Any) -> str:
    result = CliRunner().invoke(app, ["retarget", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_model_of_another_order_answers_as_one_that_was_loaded_for_reference(folder: Path) -> None:
    asked = ("--prompt", "w1", "--tokens", 4)
    found = json.loads(run(folder, "--backend", "flashinfer_trtllm", "--to", "reference", "--json", *asked))

    layers = found["before"]["flashinfer_trtllm"]
    assert found["after"] == {"reference": layers} and found["moved"] == {"linear": layers, "experts": 0}
    assert found["values_kept"] and found["addresses_kept"]
    generated = CliRunner().invoke(app, ["generate", str(folder), "w1", "--tokens", "4", "--backend", "reference"]).stdout
    assert found["answers"] == [None, generated.removesuffix("\n")]


def test_the_text_says_what_the_document_says(folder: Path) -> None:
    text = run(folder, "--backend", "reference", "--to", "flashinfer_cutlass", "--prompt", "w1", "--tokens", 2)

    assert "every value as it was: yes" in text and "flashinfer_cutlass" in text and "answer after: not asked" in text


@pytest.mark.parametrize(("arguments", "message"), [((), "nothing to move to"), (("--to", "nope"), "unknown linear backend")])
def test_what_cannot_be_is_refused_at_once(arguments: tuple[str, ...], message: str, folder: Path) -> None:
    with pytest.raises(AliasError, match=message):
        run(folder, *arguments)
