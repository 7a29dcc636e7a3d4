"""transformers' own tensor parallelism, asked for over two real processes."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch.distributed as dist

pytest.importorskip("transformers")
pytest.importorskip("modelopt")

from aliasparam_nvfp4.checkpoint import CheckpointError

from ..processes import run_ranks
from .moe_models import by_modelopt


def load(rank: int, folder: Path, port: int) -> None:
    from transformers import AutoModelForCausalLM

    from aliasparam_nvfp4.integrations.transformers import use_backend

    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in here.items()}  # as torchrun does
    with use_backend("reference", moe="reference"), pytest.raises(CheckpointError, match=r"(?s)parallel plans.*ExpertRanks"):
        AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    dist.destroy_process_group()


def test_law_8_a_parallel_plan_is_refused_before_anything_is_cut(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    run_ranks(load, (by_modelopt(tmp_path / "a", "qwen3", 0), port), 2)
