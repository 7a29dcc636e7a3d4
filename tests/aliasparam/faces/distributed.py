"""Collectives, FSDP2 and DTensor."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .forwards import forward
from .titled import Face, other, titled, weight

# -- distributed ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_rank(device: torch.device) -> Iterator[None]:
    backend = "nccl" if device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def within_group(do: Callable[[Any], Any]) -> Face:
    def face(layer: nn.Module) -> Any:
        with one_rank(weight(layer).device):
            return do(layer)

    return face


def all_gather(layer: nn.Module) -> Tensor:
    out = [torch.empty(6, 8, dtype=torch.uint8, device=weight(layer).device)]
    dist.all_gather(out, weight(layer))
    return out[0]


def scatter(layer: nn.Module) -> None:
    dist.scatter(weight(layer).data, [other(weight(layer))], src=0)


def all_gather_into(layer: nn.Module) -> None:
    dist.all_gather_into_tensor(weight(layer).data, other(weight(layer)))


def mesh(layer: nn.Module) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(weight(layer).device.type, (1,))


def fully_shard(layer: nn.Module) -> Tensor:
    from torch.distributed.fsdp import fully_shard as shard

    shard(layer, mesh=mesh(layer))
    return forward(layer)


def fully_shard_ignoring(layer: nn.Module) -> Tensor:
    from torch.distributed.fsdp import fully_shard as shard

    layer.extra = nn.Linear(2, 2, device=weight(layer).device)
    shard(layer, mesh=mesh(layer), ignored_params={weight(layer)})
    return forward(layer)


def dtensor(layer: nn.Module) -> Tensor:
    from torch.distributed.tensor import Replicate, distribute_tensor

    return distribute_tensor(weight(layer), mesh(layer), [Replicate()]).full_tensor() + 0


def distribute_module(layer: nn.Module) -> Tensor:
    from torch.distributed.tensor import distribute_module as distribute

    distribute(layer, mesh(layer))
    return forward(layer)


titled(
    "torch.distributed (one rank, gloo or NCCL; more in `test_collectives.py`)",
    {
        "`broadcast`": within_group(lambda layer: dist.broadcast(weight(layer), src=0) and None),
        "`all_reduce`": within_group(lambda layer: dist.all_reduce(weight(layer)) and None),
        "`all_gather` of the name": within_group(all_gather),
        "`scatter` into the name": within_group(scatter),
        "`all_gather_into_tensor` the name": within_group(all_gather_into),
        "FSDP2 `fully_shard`": within_group(fully_shard),
        "FSDP2 `fully_shard(ignored_params=)`": within_group(fully_shard_ignoring),
        "`distribute_tensor` (DTensor)": within_group(dtensor),
        "`distribute_module`, then the forward": within_group(distribute_module),
    },
)
