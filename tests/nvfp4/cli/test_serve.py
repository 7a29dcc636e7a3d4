"""The server as its clients meet it: a real process, the real openai client, a reload in the middle of a stream."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
from aliasparam.reload.delta_writer import diff  # noqa: E402
from aliasparam.reload.sources import SafetensorsFolder  # noqa: E402
from aliasparam_nvfp4.checkpoint import CheckpointFolder  # noqa: E402
from aliasparam_nvfp4.cli.digest import folder_digest  # noqa: E402
from aliasparam_nvfp4.cli.verify_folder import compare  # noqa: E402

from .folders import chat_folder, edit  # noqa: E402

PAGE = Path(__file__).parents[3] / "docs" / "nvfp4" / "serve.md"
TOKEN = "a-token"
TOKENS = 120
ASK: dict[str, Any] = {"model": "a", "messages": [{"role": "user", "content": "w1 w2"}], "temperature": 0}


class Server:
    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "aliasparam_nvfp4.cli", "serve", str(folder), "--port", "0", "--backend", "reference"]
        environment = {**os.environ, "ALIASPARAM_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, (line, self.process.communicate())
        self.url = found[0]
        socket.create_connection(("127.0.0.1", int(self.url.rpartition(":")[2]))).close()  # at once
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=TOKEN, max_retries=0)

    def call(self, path: str, body: Any = None, token: str = TOKEN) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Authorization": f"Bearer {token}"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def answer(self, tokens: int = 8) -> str:
        return str(self.client.chat.completions.create(**ASK, max_tokens=tokens).choices[0].message.content)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("serve")
    return chat_folder(root / "a", 1), chat_folder(root / "b", 2)


@pytest.fixture(scope="module")
def server(folders: tuple[Path, Path]) -> Iterator[Server]:
    made = Server(folders[0])
    yield made
    made.process.kill()
    made.process.communicate()
    made.client.close()


def test_the_openai_client_speaks_to_it(server: Server) -> None:
    assert [m.id for m in server.client.models.list()] == ["a"]
    text = server.client.completions.create(model="a", prompt="w1 w2", max_tokens=4, temperature=0).choices[0].text
    pieces = server.client.completions.create(model="a", prompt="w1 w2", max_tokens=4, temperature=0, stream=True)

    assert len(text.split()) == 4
    assert "".join(piece.choices[0].text or "" for piece in pieces) == text


def test_the_pages_client_speaks_to_it(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    [block] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    here = (
        block.replace("http://127.0.0.1:8000", server.url)
        .replace("checkpoint-a", "a")
        .replace("stream=True", "stream=True, max_tokens=3")
    )

    exec(compile(here, PAGE.name, "exec"), {"TOKEN": TOKEN})

    assert capsys.readouterr().out


@pytest.mark.parametrize("when", ["between_tokens", "idle"])
def test_it_is_reloaded_while_a_client_streams(server: Server, folders: tuple[Path, Path], when: str) -> None:
    a, b = folders
    assert server.call("/reload", {"folder": str(a)})[0] == 200
    before, old = server.answer(), server.answer(TOKENS)
    done: dict[str, Any] = {}

    def reload() -> None:
        done["answer"] = server.call("/reload", {"folder": str(b), "when": when})
        done["at"] = time.perf_counter()

    stream = server.client.chat.completions.create(**ASK, max_tokens=TOKENS, stream=True)
    pieces, thread = [], threading.Thread(target=reload)
    for chunk in stream:
        pieces.append(chunk.choices[0].delta.content or "")
        if len(pieces) == 3:
            thread.start()
    ended = time.perf_counter()
    thread.join(60)

    assert done["answer"][0] == 200, done
    streamed = "".join(pieces)
    assert len(streamed.split()) == TOKENS  # nothing was lost, whenever the weights changed
    if when == "idle":
        assert streamed == old and done["at"] > ended - 0.5
    else:
        assert done["at"] < ended and streamed != old
    assert server.call("/digest", {})[1]["digest"] == folder_digest(CheckpointFolder(b))["digest"]
    assert server.answer() != before


def test_a_delta_is_applied_and_the_folder_that_serves_is_proved(
    server: Server, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = folders
    monkeypatch.setenv("ALIASPARAM_TOKEN", TOKEN)
    assert server.call("/reload", {"folder": str(a)})[0] == 200
    before = server.answer()
    with SafetensorsFolder(a) as old, SafetensorsFolder(b) as new:
        diff(old, new, tmp_path / "1", 1, 0, checksum_format="adler32")
        diff(new, old, tmp_path / "3", 3, 2)

    status, answer = server.call("/delta", {"folder": str(tmp_path / "1")})
    assert (status, answer.get("version")) == (200, 1), answer
    assert compare(b, server.url, "adler32")["held"] and compare(b, server.url, "xxh3-128")["held"]
    assert server.answer() != before
    refused = server.call("/delta", {"folder": str(tmp_path / "3")})
    assert refused[0] == 409 and "applies to another version" in refused[1]["error"]["message"]
    again = server.call("/delta", {"folder": str(tmp_path / "1")})
    assert again[0] == 409 and compare(b, server.url, "blake3")["held"]
    found = compare(a, server.url, "adler32")
    assert not found["held"] and "model.embed_tokens.weight" in found["differing"]


@pytest.mark.parametrize(
    ("other", "held"),
    [({"quant_algo": "W4A16_NVFP4"}, False), ({"ignore": ["lm_head", "*down_proj"]}, False), ({"quant_algo": "NVFP4_AWQ"}, True)],
)
def test_a_folder_with_the_same_bytes_that_would_be_served_otherwise_does_not_serve(
    server: Server, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: Any, held: bool
) -> None:
    monkeypatch.setenv("ALIASPARAM_TOKEN", TOKEN)
    assert server.call("/reload", {"folder": str(folders[0])})[0] == 200
    folder = Path(shutil.copytree(folders[0], tmp_path / "a"))
    assert compare(folder, server.url, "adler32")["held"]
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"] | other
    edit(folder / "config.json", quantization_config=quantization)

    found = compare(folder, server.url, "adler32")
    assert (found["held"], found["differing"]) == (held, [])
    assert held or "quantized in another way" in found["otherwise"]


def test_what_waits_in_line_begins_where_the_one_before_ended(server: Server, folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Nothing lies between two jobs of the model's thread: the next delta is not held against what served when it was sent."""
    assert server.call("/reload", {"folder": str(folders[0])})[0] == 200
    with SafetensorsFolder(folders[0]) as a, SafetensorsFolder(folders[1]) as b:
        for version in range(1, 5):
            diff(*((a, b) if version % 2 else (b, a)), tmp_path / str(version), version, version - 1)
    answers: dict[int, Any] = {}

    def send(version: int) -> None:
        answers[version] = server.call("/delta", {"folder": str(tmp_path / str(version))})

    line = [threading.Thread(target=server.answer, args=(TOKENS,))]
    line += [threading.Thread(target=send, args=(version,)) for version in range(1, 5)]
    for thread in line:
        thread.start()
        time.sleep(0.05)  # in order, while the first is answered
    for thread in line:
        thread.join()

    assert [answers[version][0] for version in range(1, 5)] == [200] * 4, answers
    assert server.call("/v1/models")[1]["data"][0]["version"] == 4


def test_a_refused_reload_changes_nothing(server: Server, folders: tuple[Path, Path], tmp_path: Path) -> None:
    assert server.call("/reload", {"folder": str(folders[0])})[0] == 200
    before, digest = server.answer(), server.call("/digest")

    status, answer = server.call("/reload", {"folder": str(tmp_path)})

    assert status == 409 and "missing" in answer["error"]["message"]
    assert (server.answer(), server.call("/digest")) == (before, digest)
    assert server.call("/memory")[1]["saved_bytes"] > 0


@pytest.mark.parametrize(
    ("path", "body", "token", "status"),
    [
        ("/v1/models", None, "", 401),
        ("/v1/chat/completions", ASK, "wrong", 401),
        ("/reload", {"folder": "/x"}, "wrong", 401),
        ("/digest", {}, "", 401),
        ("/delta", {}, TOKEN, 400),
        ("/digest", {"kind": "crc"}, TOKEN, 400),
        ("/digest", {"kind": []}, TOKEN, 400),
        ("/health", None, "", 200),
        ("/reload", {}, TOKEN, 400),
        ("/reload", {"folder": "/x", "when": "now"}, TOKEN, 400),
        ("/reload", {"folder": "x" * 5000}, TOKEN, 409),
        ("/reload", {"folder": "a\0b"}, TOKEN, 400),
        ("/delta", {"folder": "\ud800"}, TOKEN, 400),
        ("/reload", [1], TOKEN, 400),
        ("/v1/chat/completions", {}, TOKEN, 400),
        ("/v1/chat/completions", ASK | {"messages": [1]}, TOKEN, 400),
        ("/v1/chat/completions", ASK | {"model": "b"}, TOKEN, 400),
        ("/v1/completions", {"model": "a", "prompt": ""}, TOKEN, 400),
        ("/v1/chat/completions", ASK | {"nonsense": 1}, TOKEN, 422),
        ("/reload", {"folder": "x" * (17 << 20)}, TOKEN, 413),
        ("/nothing", None, TOKEN, 404),
    ],
)
def test_what_it_refuses(server: Server, path: str, body: Any, token: str, status: int) -> None:
    found, answer = server.call(path, body, token)

    assert found == status
    assert status == 200 or answer["error"]["message"]


def test_a_port_that_is_taken_fails_before_a_model_is_loaded(server: Server, folders: tuple[Path, Path]) -> None:
    port = server.url.rpartition(":")[2]
    command = [sys.executable, "-m", "aliasparam_nvfp4.cli", "serve", str(folders[0]), "--port", port]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    assert ended.returncode == 2 and ended.stderr == f"error: 127.0.0.1:{port}: Address already in use\n"


def test_an_interrupt_ends_it_quietly_although_a_client_streams(folders: tuple[Path, Path]) -> None:
    server = Server(folders[0])
    stream = server.client.chat.completions.create(**ASK, max_tokens=100_000, stream=True)
    next(iter(stream))

    server.process.send_signal(signal.SIGINT)
    _, errors = server.process.communicate(timeout=60)

    assert server.process.returncode == -signal.SIGINT
    assert errors == ""
