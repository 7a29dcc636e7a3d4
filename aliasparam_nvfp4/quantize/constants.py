"""Keeping small constant tensors (index tables, code books) between calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

from aliasparam.host import HOST

_P = ParamSpec("_P")
_R = TypeVar("_R")


def cached_constant(make: Callable[_P, _R]) -> Callable[_P, _R]:
    """``make`` with its results kept per arguments, except while torch traces: then they would be stand-ins without values."""

    def on_cpu(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with HOST:  # a module may be built inside `with torch.device("meta")`: tables need values
            return make(*args, **kwargs)

    cached = lru_cache(maxsize=512)(on_cpu)

    @wraps(make)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
            return make(*args, **kwargs)
        return cached(*args, **kwargs)  # type: ignore[arg-type]

    return wrapper
