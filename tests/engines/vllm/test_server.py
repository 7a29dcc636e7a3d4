"""What ``vllm serve`` starts, over HTTP with the plugin: the commands of docs/nvfp4/vllm.md on SmolLM2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from . import engine as engine  # its environment; skips without vLLM
from .engine import QUESTION

from ..server import server  # isort: skip

pytest.importorskip("model_hosting_container_standards", reason="vLLM's server needs it: make engine-vllm")

FLAGS = ["--dtype=bfloat16", "--max-model-len=128", "--enforce-eager", "--served-model-name=m"]
OWN_ENGINE = '--weight-transfer-config={"backend": "aliasparam_nvfp4"}'


def test_a_server_is_reloaded_updated_and_checked(real: tuple[Path, Path], tmp_path: Path) -> None:
    from aliasparam.reload.delta_writer import diff
    from aliasparam.reload.sources import SafetensorsFolder

    a, b = (str(folder) for folder in real)
    with SafetensorsFolder(a) as old, SafetensorsFolder(b) as new:
        diff(old, new, tmp_path / "weight_v000001", 1, 0)
    arguments = ["--model", a, *FLAGS, OWN_ENGINE]
    options = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    log = tmp_path / "log"
    # The command itself asks for the version of "vllm", which the build for a CPU has under another name.
    with server("vllm.entrypoints.openai.api_server", arguments, log, ALIASPARAM_NVFP4_POLICY="staged", **options) as post:

        def said() -> Any:
            post("/reset_prefix_cache")
            ask = {"model": "m", "messages": QUESTION, "max_tokens": 5, "temperature": 0}
            return post("/v1/chat/completions", ask)["choices"][0]["message"]["content"]

        assert said() == "This is checkpoint A."
        assert "aliasparam_nvfp4 serves 120 layers by reference" in log.read_text()
        checksums = post("/weight_checker", {"action": "checksum"})["checksums"]
        assert not [name for name in checksums if "prepared" in name or "alpha" in name]

        post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": b}})
        assert said() == "This is checkpoint B."
        post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path)}}, status=500)
        assert said() == "This is checkpoint B."

        post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": a}})
        assert post("/weight_checker", {"action": "compare", "baseline": checksums}) == {"match": True, "mismatches": []}
        post("/start_weight_update")
        post("/update_weights", {"update_info": {"delta": str(tmp_path / "weight_v000001")}})
        assert said() == "This is checkpoint A."  # until the end
        post("/finish_weight_update", {"weight_version": "1"})
        assert said() == "This is checkpoint B."

        post("/weight_checker", {"action": "reset"})  # zeros under every name
        assert not post("/weight_checker", {"action": "compare", "baseline": checksums})["match"]
        for _ in range(2):  # the model refuses, and the server lives
            post("/v1/chat/completions", {"model": "m", "messages": QUESTION, "max_tokens": 5}, status=500)
        post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": a}})
        assert said() == "This is checkpoint A."
        assert post("/weight_checker", {"action": "compare", "baseline": checksums})["match"]
