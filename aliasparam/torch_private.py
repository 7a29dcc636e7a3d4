"""Every private API of torch that the library uses, each with what it is for.

What ``torch.compile`` does where a traced caller meets this library: it leaves the graph, or says why it cannot. Only code that
reads kernel names of ready modules is traced; those are plain tensors.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves as tree_leaves  # tensors in the arguments of an operator
from torch.utils._pytree import tree_map as tree_map

#: The code of every module call, compiled ones too: a frame of it is a forward that runs, and ``self`` there is the module.
FORWARD = torch.nn.Module._wrapped_call_impl.__code__


def refused_when_traced(function: Any, reason: str) -> None:
    """With ``fullgraph=True`` torch.compile refuses a caller of ``function`` with ``reason``; else the call leaves the graph."""
    # What torch.compiler.disable(function, reason=...) sets; the decorator would import the compiler with this library.
    function = getattr(function, "__func__", function)
    function._torchdynamo_disable = True
    function._torchdynamo_disable_msg = reason


def never_traced(cls: type) -> None:
    """Methods of ``cls``, and what they call, run as they are once a caller has left its graph."""
    eval_frame = torch._C._dynamo.eval_frame
    skip = getattr(eval_frame, "_FrameAction", None)
    if skip is None:
        return
    strategy = eval_frame._FrameExecStrategy(skip.SKIP, skip.SKIP)
    for member in vars(cls).values():
        function = getattr(member, "__func__", getattr(member, "fget", member))
        if isinstance(function, types.FunctionType):
            eval_frame.set_code_exec_strategy(function.__code__, strategy)


@cache
def import_what_dispatch_imports() -> None:
    """The first operator that torch hands to a tensor subclass imports DTensor, and sympy with it. A process that forks meanwhile
    (a loader's thread works, a DataLoader starts) would leave the child with a lock on the import that nobody gives back."""
    if torch.distributed.is_available():
        importlib.import_module("torch.distributed.tensor")


def shares_memory(first: Tensor, second: Tensor) -> bool:
    """Whether two plain tensors are views of one allocation."""
    return bool(torch._C._is_alias_of(first, second))  # type: ignore[attr-defined]


#: Whether a tensor is one of the zeros that autograd makes, which have an address and no bytes.
has_no_bytes = Tensor._is_zerotensor


def writes_counted(tensor: Tensor) -> int:
    """How often torch saw it written: never, if it was made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def is_alone(memory: torch.UntypedStorage) -> bool:
    """Whether torch allocated this memory and one tensor alone looks at it.

    Memory of numpy, of a mapped file, of a buffer or another process is not resizable, or is shared.
    """
    uses = torch._C._storage_Use_Count(memory._cdata)  # the tensor, and ``memory``
    return uses <= 2 and memory.resizable() and not (memory.device.type == "cpu" and memory.is_shared())


def outside_inference() -> AbstractContextManager[Any]:
    """Tensors made inside can be written anywhere. Costs nothing where inference mode is off, as it is where models are made."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def writing(tensor: Tensor) -> AbstractContextManager[Any]:
    """Without autograd; and what was made in inference mode is written in it alone."""
    return torch.inference_mode() if tensor.is_inference() else torch.no_grad()


def outside_modes() -> AbstractContextManager[Any]:
    """Tensors made inside are real ones, also among stand-ins (``FakeTensorMode``)."""
    return _disable_current_modes()


#: The mode, or None: whether torch computes with stand-ins for tensors (``FakeTensorMode``), so that nothing writes any memory.
#: No function of our own around it, as every write asks.
stand_ins = partial(torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey.FAKE)


def is_traced_by_jit() -> bool:
    """Whether ``torch.jit.trace`` is running: what it makes saves raw memory."""
    return torch._C._get_tracing_state() is not None


@contextmanager
def nothing_compiles(seconds: float) -> Iterator[bool]:
    """Whether, and while, no other thread is inside torch.compile's translation (``torch._dynamo.convert_frame``), whose frames
    must not be walked from outside: CPython 3.11 hands out ones that are freed already. Waits for at most ``seconds``."""
    dynamo = sys.modules.get("torch._dynamo.convert_frame")
    if dynamo is None:
        yield True
        return
    held = dynamo.compile_lock.acquire(timeout=max(seconds, 0))
    try:
        yield held
    finally:
        if held:
            dynamo.compile_lock.release()


def below_autograd() -> AbstractContextManager[None]:
    """Operators called inside go on below the autograd keys: for a kernel that wraps one there."""
    return torch._C._AutoDispatchBelowAutograd()


def work_that_is_done() -> Any:
    """As c10d operators return it."""
    done: torch.futures.Future[Any] = torch.futures.Future()
    done.set_result([])
    return torch._C._distributed_c10d._create_work_from_future(done).boxed()  # type: ignore[attr-defined]
