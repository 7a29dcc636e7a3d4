"""Models in wrappers reload: DistributedDataParallel and FSDP2 over gloo, torch.compile around each."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

transformers = pytest.importorskip("transformers")
from aliasparam import AliasedParameter  # noqa: E402
from aliasparam_nvfp4.checkpoint import CheckpointError  # noqa: E402
from aliasparam_nvfp4.integrations.transformers import reload_folder  # noqa: E402

from ..processes import run_ranks  # noqa: E402
from .test_real_folders import folders, load, logits  # noqa: E402

KIND = "GLM-4.5"


def data_parallel(model: Any) -> Any:
    # gloo has no FP8, and kernel names are nobody's to send around; every process has read the same folder.
    return torch.nn.parallel.DistributedDataParallel(model, init_sync=False, broadcast_buffers=False)


def sharded_around(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, ignored_params=set(model.parameters()))


def compiled_data_parallel(model: Any) -> Any:
    return torch.compile(data_parallel(model), backend="eager")


def data_parallel_compiled(model: Any) -> Any:
    return data_parallel(torch.compile(model, backend="eager"))


WRAPPERS = (data_parallel, sharded_around, compiled_data_parallel, data_parallel_compiled)


def there_and_back(root: str) -> None:
    """In one process of a group: A, B and A again, in each wrapper, are what cold loads give."""
    a, b, cls = Path(root, "a", "published"), Path(root, "b", "published"), transformers.Glm4MoeForCausalLM
    first, second = logits(load(a, cls)), logits(load(b, cls))
    for wrap in WRAPPERS:
        wrapped = wrap(load(a, cls))
        for folder, expected in ((a, first), (b, second), (a, first)):
            if folder is b or not torch.equal(logits(wrapped), expected):
                reload_folder(wrapped, folder)
            assert torch.equal(logits(wrapped), expected), (wrap.__name__, folder)


def divided_is_refused(root: str) -> None:
    """FSDP2 divides the plain parameters among ranks: a reload says so before it writes anything."""
    from torch.distributed.fsdp import fully_shard

    a, b, cls = Path(root, "a", "published"), Path(root, "b", "published"), transformers.Glm4MoeForCausalLM
    model = load(a, cls)
    first = logits(model)
    fully_shard(model, ignored_params={p for p in model.parameters() if isinstance(p, AliasedParameter)})
    with pytest.raises(CheckpointError, match=r"divided among ranks(.|\n)*ignored_params"):
        reload_folder(model, b)
    assert torch.equal(logits(model), first)


def process(rank: int, port: int, root: str, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        if world == 1:
            divided_is_refused(root)
        else:
            there_and_back(root)
    finally:
        dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("world", [1, 2], ids=["divided", "wrapped"])
def test_wrapped_models_reload_as_bare_ones(world: int, tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):  # before there is a group: in one transformers writes on the first rank alone
        folders(KIND, seed, tmp_path / name)
    run_ranks(process, (free_port(), str(tmp_path), world), world)
