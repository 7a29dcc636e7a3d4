"""``verify --engine``: what it refuses before an engine starts. The engines themselves: tests/engines."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aliasparam.errors import AliasError
from aliasparam_nvfp4.cli.app import app
from aliasparam_nvfp4.cli.verify_engine import Decoded, _row


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["verify", *arguments])
    if isinstance(result.exception, AliasError):
        raise result.exception
    assert result.exit_code == 2
    return result.output


def test_what_cannot_be_is_refused_at_once(tmp_path: Path) -> None:
    model = ("--model", str(tmp_path))
    assert "--model" in run("--engine", "vllm")
    assert "NAME=VALUE" in run("--engine", "vllm", *model, "--engine-option", "=1")
    with pytest.raises(AliasError, match="unknown engine"):
        run("--engine", "nope", *model)
    with pytest.raises(AliasError, match="checksum_format"):  # before the folder, which is empty, is looked at
        run("--folder", str(tmp_path), "--digest", "crc32")


def test_an_option_of_another_question_is_refused(tmp_path: Path) -> None:
    here = str(tmp_path)
    assert "--server needs --folder" in run("--server", "http://127.0.0.1:1")
    assert "--model needs --engine" in run("--model", here)
    assert "--moe does not go with --folder" in run("--folder", here, "--moe")
    assert "--folder does not go with --engine" in run("--engine", "vllm", "--folder", here)


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_an_engine_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(AliasError, match=f"{name} cannot be imported"):
        run("--engine", name, "--model", str(tmp_path))


def test_other_tokens_and_other_logprobs_are_told_apart() -> None:
    first = Decoded([1, 2], [-0.5, -1.0])
    near, far, other = Decoded([1, 2], [-0.5, -1.00005]), Decoded([1, 2], [-0.5, -1.1]), Decoded([1, 3], [-0.5, -1.0])

    assert [_row("", first, now)["held"] for now in (first, near, far, other)] == [True, True, False, False]
    assert [_row("", first, now, differs=True)["held"] for now in (first, far, other)] == [False, True, True]
    assert _row("", first, other)["apart"] is None
