"""What ``torch.compile`` does where a traced caller meets this library: it leaves the graph, or says why it cannot.

Only code that reads current kernel names is traced; those are plain tensors.
"""

from __future__ import annotations

import types
from typing import Any

import torch


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
