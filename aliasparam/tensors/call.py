"""What an operator is called with: the names among its arguments, and which arguments it writes. Collectives write too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..spec import instances_in
from ..storage.kernel_name import RefusingName
from ..storage.storage import AliasedStorage
from ..torch_private import below_autograd, work_that_is_done

#: torch's in-place operators whose result does not depend on what was there, as that of its ``out=`` does not. All others read
#: before they write; also another library's of the same name, and what it calls ``out``.
_OVERWRITES = frozenset(
    {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_", "normal_", "uniform_", "random_", "exponential_"}
)
#: Operators whose schemas do not mark that they write the running statistics, those with a ``training`` where it is true.
UPDATES_STATISTICS = frozenset(
    {"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "batch_norm_update_stats"}
    | {"batch_norm_gather_stats", "batch_norm_gather_stats_with_counts"}
)
#: Of collectives, whose schemas do not say what they write: arguments that are only read; operators whose ``tensors`` are read;
#: operators that read what they overwrite.
_SENT = frozenset({"input_tensors", "input_tensor", "input_list", "inputs", "input"})
_SENDS = frozenset({"send"})
_REDUCES = frozenset({"allreduce_", "reduce_", "allreduce_coalesced_"})


class Aliased(Tensor):
    """What the dispatcher knows of a name, or of a view of one."""

    _alias_storage: AliasedStorage
    _alias_geometry: Tensor

    def _alias_view(self, geometry: Tensor) -> Tensor:
        """A view of the same storage."""
        raise NotImplementedError


def mapped(change: Callable[[Aliased], Tensor], value: Any) -> Any:
    if isinstance(value, Aliased):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([mapped(change, v) for v in value])
    return value


def called(func: Any, change: Callable[[Aliased], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func`` of what ``change`` makes of each name."""
    return func(*[mapped(change, a) for a in args], **({k: mapped(change, v) for k, v in kwargs.items()} if kwargs else kwargs))


def aliased_in(values: Any) -> Iterator[Aliased]:
    return instances_in(values, Aliased)


class Call(NamedTuple):
    """The arguments of one call of an operator that writes, by name.

    Attributes:
        read, written: which are which.
        overwrites: whether the result does not depend on what was there.
    """

    read: dict[str, Any]
    written: dict[str, Any]
    overwrites: bool

    @classmethod
    def of(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        arguments = func._schema.arguments
        given = dict(zip([a.name for a in arguments], args, strict=False)) | kwargs
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d":
            sends = name in _SENDS or (name == "broadcast_" and _is_root(given))
            read = {n: v for n, v in given.items() if sends or n in _SENT or next(instances_in((v,), Tensor), None) is None}
            return cls(read, {n: v for n, v in given.items() if n not in read}, name not in _REDUCES)
        names, are_out = _written(func)
        if name in UPDATES_STATISTICS and given.get("training", True):
            names, are_out = [*names, "running_mean", "running_var"], False
        written = {n: given.pop(n) for n in names if n in given}
        return cls(given, written, namespace == "aten" and (are_out or name in _OVERWRITES))


@cache
def _written(func: Any) -> tuple[list[str], bool]:
    """The names of the arguments that an operator writes, and whether all are ``out=``."""
    written = [a for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [a.name for a in written], all(a.is_out for a in written)


def _is_root(given: dict[str, Any]) -> bool:
    from torch.distributed import ProcessGroup

    group = ProcessGroup.unbox(given["process_group"])
    return bool(group.rank() == given["root_rank"])


def waited_for(result: Any) -> Any:
    """What an operator returned, once the work among it is done: another stands for it, as gloo's receive can be waited for once.
    NCCL gives an empty box where the current stream waits already."""
    if isinstance(result, tuple):
        return tuple(map(waited_for, result))
    if isinstance(result, torch.ScriptObject):
        from torch.distributed import Work

        work = Work.unbox(result)
        if work is not None:
            work.wait()
            return work_that_is_done()
    return result


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
        name = next(instances_in((*args, *kwargs.values()), (Aliased, RefusingName)), None)
        if name is not None:  # torch does not see those in lists of lists
            return type(name).__torch_dispatch__(func, (), args, kwargs)
        torch.autograd.graph.increment_version(list(instances_in(Call.of(func, args, kwargs).written.values(), Tensor)))
        with below_autograd():
            return func(*args, **kwargs)

    return counted
