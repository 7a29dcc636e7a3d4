"""Collectives into a name: their schemas do not say what they write, so every name in them counts as written."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from aliasparam import Alias, declare, process
from aliasparam.errors import StaleKernelError

from ..processes import run_ranks
from .small import SWAP, kernel


def layer_of(value: int) -> nn.Module:
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.arange(24, dtype=torch.uint8).view(6, 4) + value, requires_grad=False)
    declare(layer, Alias("weight", "prepared", SWAP))
    process(layer)
    return layer


def ranks(rank: int, folder: str) -> None:
    most = timedelta(seconds=20)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=most)
    try:
        layer = layer_of(100 * rank)
        expected = torch.arange(24, dtype=torch.uint8).view(6, 4)
        address = layer.weight.data_ptr()

        dist.broadcast(layer.weight, src=0)
        assert torch.equal(layer.weight, expected), "broadcast into the whole name"
        process(layer)
        assert torch.equal(layer.prepared, kernel(SWAP, expected))

        dist.broadcast(layer.weight.data[2:4], src=1)
        dist.all_reduce(layer.weight[:1])
        expected[:1] *= 2
        assert torch.equal(layer.weight, expected), "collectives into slices of a name in kernel format"

        gathered = [torch.empty_like(expected) for _ in range(2)]
        process(layer)
        dist.all_gather(gathered, layer.weight)
        assert torch.equal(gathered[1 - rank], expected), "what is sent is checkpoint values"
        process(layer)
        assert torch.equal(layer.prepared, kernel(SWAP, expected))

        mine = torch.empty_like(expected[:3])  # names in a list of lists, which torch's dispatcher does not look into
        dist.scatter(mine, [layer.weight[:3], layer.weight[3:]] if rank == 0 else None, src=0)
        assert torch.equal(mine, expected[3 * rank : 3 * rank + 3]), "parts of a name in kernel format are scattered by value"
        if rank == 0:  # from rank to rank, waited for by the caller too
            dist.send(layer.weight[3:], 1)
            dist.isend(layer.weight[:3], 1).wait()
        else:
            dist.recv(layer.weight[:3], 0)
            dist.irecv(layer.weight[3:], 0).wait()
            expected = torch.cat([expected[3:], expected[:3]])
        assert torch.equal(layer.weight, expected), "checkpoint values are sent and received"
        layer.weight[:1] = 0
        with pytest.raises(StaleKernelError):
            dist.scatter(mine, [layer.prepared, layer.prepared], src=rank)
        assert layer.weight.data_ptr() == address
    finally:
        dist.destroy_process_group()


@pytest.fixture
def store() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
def test_law_1_collectives_read_and_write_checkpoint_values(store: Path) -> None:
    run_ranks(ranks, (str(store),), 2)
