"""SGLang's engine and server in processes of their own: tokens before and after updates, and whether they go on answering."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("sglang", reason="SGLang is not installed: make test-sglang")

from .folders import DENSE, moe, need_dense
from .runner import CPU, PROMPT

GREEDY = {"temperature": 0, "max_new_tokens": 8}
WEIGHT = "model.layers.1.self_attn.o_proj.weight"


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    import sglang

    started = sglang.Engine(model_path=str(folder), **CPU, **options)
    try:
        yield started
    finally:
        started.shutdown()


def tokens(engine: Any) -> list[int]:
    return engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"]  # type: ignore[no-any-return]


def served(engine: Any, path: Path, ranks: int = 1) -> list[dict[str, Any]]:
    """What each rank's scheduler says of its model; see stub/aliasparam_probe.py."""
    engine.collective_rpc("probe", path=str(path))
    return [json.loads(Path(f"{path}.{rank}.json").read_text()) for rank in range(ranks)]


def cut(folder: Path, to: Path) -> Path:
    """The folder with one tensor of another shape."""
    tensors = load_file(folder / "model.safetensors")
    tensors[WEIGHT] = tensors[WEIGHT][:, :-8].contiguous()
    to.mkdir()
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_text((folder / "config.json").read_text())
    return to


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("engine")
    return {tag: moe(where / tag, seed) for seed, tag in enumerate("ab")}


def test_two_ranks_update_together_or_not_at_all(
    experts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TP=2 over gloo: A, B, a folder that is refused, A by a session; tokens, digests and addresses of both ranks."""
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")  # SGLang asks for a NUMA node a rank otherwise
    with engine(experts["b"], tp_size=2) as fresh:
        cold = tokens(fresh), [rank["digest"] for rank in served(fresh, tmp_path / "cold", 2)]
    with engine(experts["a"], tp_size=2) as warm:
        first = tokens(warm)
        before = served(warm, tmp_path / "before", 2)
        assert all("AliasedModelOptNvFp4FusedMoEMethod" in rank["methods"] for rank in before)
        assert warm.update_weights_from_disk(str(experts["b"]))[0]
        after = served(warm, tmp_path / "after", 2)
        assert (tokens(warm), [rank["digest"] for rank in after]) == cold and first != cold[0]
        assert [rank["addresses"] for rank in after] == [rank["addresses"] for rank in before]
        success, message, *_ = warm.update_weights_from_disk(str(cut(experts["a"], tmp_path / "bad")))
        assert not success and "the old weights serve" in message and tokens(warm) == cold[0]
        assert warm.begin_weight_update()[0]
        assert warm.update_weights_from_tensor(list(load_file(experts["a"] / "model.safetensors").items()))[0]
        assert tokens(warm) == cold[0]  # until the end the old weights serve
        assert warm.end_weight_update()[0] and tokens(warm) == first
        assert warm.begin_weight_update()[0]
        assert not warm.update_weights_from_tensor([(WEIGHT, torch.zeros(3, 3, dtype=torch.uint8))])[0]
        assert not warm.end_weight_update()[0] and tokens(warm) == first
        warm.release_memory_occupation()
        warm.resume_memory_occupation()
        assert tokens(warm) == first


def test_the_server_answers_before_and_after_updates(tmp_path: Path) -> None:
    """The demo's model over HTTP: A to B, a bad folder, and B to A by a delta."""
    from aliasparam.reload.delta_writer import diff
    from aliasparam.reload.sources import SafetensorsFolder

    need_dense()
    with SafetensorsFolder(DENSE["a"]) as a, SafetensorsFolder(DENSE["b"]) as b:
        diff(b, a, tmp_path / "weight_v000001", 1, 0)
    with server(DENSE["a"], tmp_path / "log") as post:
        ask = {"input_ids": PROMPT, "sampling_params": GREEDY}
        first = post("/generate", ask)["output_ids"]
        assert post("/update_weights_from_disk", {"model_path": str(DENSE["b"])})["success"]
        second = post("/generate", ask)["output_ids"]
        refused = post("/update_weights_from_disk", {"model_path": str(cut(DENSE["a"], tmp_path / "bad"))}, status=400)
        assert not refused["success"] and WEIGHT in refused["message"] and post("/generate", ask)["output_ids"] == second
        assert post("/update_weights_from_disk", {"model_path": str(tmp_path / "weight_v000001")})["success"]
        assert post("/generate", ask)["output_ids"] == first and first != second


@contextmanager
def server(folder: Path, log: Path) -> Iterator[Any]:
    """``python -m sglang.launch_server`` as a user starts it; gives a function that posts JSON."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}") for key, value in CPU.items()]
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(folder), "--port", str(port), *flags]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)

    def post(path: str, body: Any, status: int = 200) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                found, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            found, text = error.code, error.read()
        assert found == status, (found, text)
        return json.loads(text)

    try:
        _wait(port, process, log)
        yield post
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(port: int, process: Any, log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])
