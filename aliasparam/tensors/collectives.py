"""Collectives count as writes of what they write."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..spec import instances_in
from ..torch_private import below_autograd
from .call import Call

_WRITERS = (
    *("broadcast_", "allreduce_", "allreduce_coalesced_", "reduce_", "allgather_", "_allgather_base_", "allgather_coalesced_"),
    *("allgather_into_tensor_coalesced_", "gather_", "scatter_", "reduce_scatter_", "_reduce_scatter_base_"),
    *("reduce_scatter_tensor_coalesced_", "alltoall_", "alltoall_base_", "recv_", "recv_any_source_"),
)


@cache
def count_collective_writes() -> None:
    """From now on collectives bump the version counters of what they write, as operators do. torch leaves that out, and a
    broadcast into a kernel name could not be noticed."""
    if not torch.distributed.is_available():
        return
    for name in _WRITERS:
        if hasattr(torch.ops.c10d, name):  # not every version of torch has each
            for key in ("AutogradCPU", "AutogradCUDA"):
                _LIBRARY.impl(name, _counting(getattr(torch.ops.c10d, name).default), key)  # type: ignore[no-untyped-call]


_LIBRARY = torch.library.Library("c10d", "IMPL")  # type: ignore[no-untyped-call]


def _counting(func: Any) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        torch.autograd.graph.increment_version(list(instances_in(Call.of(func, args, kwargs).written.values(), Tensor)))
        with below_autograd():
            return func(*args, **kwargs)

    return counted
