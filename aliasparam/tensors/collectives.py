"""What c10d operators write: their schemas do not say it, the names of their arguments do."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..spec import instances_in
from ..torch_private import below_autograd

#: Arguments that are only read; operators whose ``tensors`` are read; operators that read what they overwrite.
_SENT = frozenset({"input_tensors", "input_tensor", "input_list", "inputs", "input"})
_SENDS = frozenset({"send"})
_REDUCES = frozenset({"allreduce_", "reduce_", "allreduce_coalesced_"})
_WRITERS = (
    *("broadcast_", "allreduce_", "allreduce_coalesced_", "reduce_", "allgather_", "_allgather_base_", "allgather_coalesced_"),
    *("allgather_into_tensor_coalesced_", "gather_", "scatter_", "reduce_scatter_", "_reduce_scatter_base_"),
    *("reduce_scatter_tensor_coalesced_", "alltoall_", "alltoall_base_", "recv_", "recv_any_source_"),
)


class Collective(NamedTuple):
    """The arguments of one call, by name."""

    read: dict[str, Any]
    written: dict[str, Any]
    reduces: bool

    @classmethod
    def of(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Collective:
        name = func._schema.name.partition("::")[2]
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        sends = name in _SENDS or (name == "broadcast_" and _is_root(given))
        read = {n: v for n, v in given.items() if sends or n in _SENT or next(instances_in((v,), Tensor), None) is None}
        return cls(read, {n: v for n, v in given.items() if n not in read}, name in _REDUCES)


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
        torch.autograd.graph.increment_version(list(instances_in(Collective.of(func, args, kwargs).written.values(), Tensor)))
        with below_autograd():
            return func(*args, **kwargs)

    return counted


def wait_for(result: Any) -> None:
    """Wait for the work among what a c10d operator returned. NCCL gives an empty box where the current stream waits already."""
    from torch.distributed import Work

    for part in result if isinstance(result, (list, tuple)) else (result,):
        if isinstance(part, torch.ScriptObject):
            work = Work.unbox(part)
            if work is not None:
                work.wait()


def _is_root(given: dict[str, Any]) -> bool:
    from torch.distributed import ProcessGroup

    group = ProcessGroup.unbox(given["process_group"])
    return bool(group.rank() == given["root_rank"])
