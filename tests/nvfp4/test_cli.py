"""The command line as a user meets it, wrong input first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
from .test_transformers import truncate, write_checkpoint


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aliasparam_nvfp4.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=None)


def test_inspect_and_doctor(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "a", 1)

    shown = run("inspect", folder)

    assert shown.returncode == 0, shown.stderr
    assert "NVFP4, group size 16" in shown.stdout
    assert "weight_scale_2" in shown.stdout
    doctor = run("doctor")
    assert "reference" in doctor.stdout
    assert "flashinfer_cutlass" in doctor.stdout


@pytest.mark.parametrize("command", ["inspect", "generate", "quantize"])
def test_wrong_folders_are_one_message_and_no_traceback(tmp_path: Path, command: str) -> None:
    extra = {"inspect": [], "generate": ["hello"], "quantize": [tmp_path / "out"]}[command]

    failed = run(command, tmp_path / "nothing", *extra)

    assert failed.returncode == 2
    assert "no such folder" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_reload_refuses_a_damaged_folder_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    a, b = write_checkpoint(tmp_path / "a", 1), write_checkpoint(tmp_path / "b", 2)
    for folder in (a, b):
        write_tokenizer(folder)
    truncate(b)

    result = run("reload", a, b, a, "--prompt", "w1 w2", "--tokens", "4", "--backend", "reference")

    lines = result.stdout.splitlines()
    assert result.returncode == 1, result.stderr
    assert "refused" in result.stdout
    assert "truncated" in result.stdout
    assert lines[0] == lines[-1]  # A, refused B, A again


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="w0").save_pretrained(folder)
