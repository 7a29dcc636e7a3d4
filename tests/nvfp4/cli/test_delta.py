"""``delta`` and ``verify --folder``: from two folders to a model of the second that was loaded from the first."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
from typer.testing import CliRunner

from aliasparam.errors import AliasError
from aliasparam_nvfp4.cli.app import app
from aliasparam_nvfp4.cli.digest import folder_digest, model_digest
from aliasparam_nvfp4.cli.verify_folder import of_server
from aliasparam_nvfp4.integrations.transformers import apply_delta_folder, load_model

from .folders import chat_folder


def command(*words: str) -> Any:
    ended = CliRunner().invoke(app, [*words, "--json"])
    return ended.exit_code, json.loads(ended.stdout) if ended.stdout else ended.exception


@pytest.mark.parametrize("backend", ["reference", "flashinfer_trtllm"])
@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_a_delta_between_folders_makes_the_model_the_second(backend: str, encoding: str, tmp_path: Path) -> None:
    a, b = chat_folder(tmp_path / "a", 1), chat_folder(tmp_path / "b", 2)
    out = tmp_path / "weight_v000001"
    code, said = command("delta", str(a), str(b), str(out), "--encoding", encoding, "--checksum", "adler32")
    assert code == 0 and 0 < said["changed"] <= said["tensors"], said

    model = load_model(a, backend)[0]
    assert model_digest(model)["digest"] == folder_digest(a)["digest"]
    assert apply_delta_folder(model, out, serving=0) == 1
    assert model_digest(model) == folder_digest(b)


def test_verify_a_folder(tmp_path: Path) -> None:
    a = chat_folder(tmp_path / "a", 1)
    code, said = command("verify", "--folder", str(a), "--digest", "xxh3-128")
    assert (code, said["held"], said["differing"]) == (0, True, [])


@pytest.mark.parametrize(
    "server", ["localhost:1", "http://", "http://[::1", "http://127.0.0.1:port", "http://a b", "http://127.0.0.1:1"]
)
def test_what_is_no_server_is_one_error_that_names_it(server: str) -> None:
    with pytest.raises(AliasError, match=re.escape(server)):
        of_server(server, "adler32")
