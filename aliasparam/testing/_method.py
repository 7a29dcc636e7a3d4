"""A method under test, and what a cold start of it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..module.verdict import without_aliasing
from ._engine import Forward, Outputs
from ._values import Values


@dataclass
class Method:
    """A quantization method as :func:`check_method` was told about it."""

    name: str
    make: Callable[[], nn.Module]
    process: Callable[[nn.Module], Any]
    before_load: Callable[[nn.Module], Any]
    outputs: Outputs
    forward: Forward | None
    values: Values
    max_bytes: int | None
    export: bool
    without: frozenset[int]

    def made(self, *, aliasing: bool = True) -> nn.Module:
        with switched(aliasing):
            module = self.make()
        module.__dict__["_created_with"] = frozenset(n for n, _ in module.named_parameters())
        return module


@dataclass
class Cold:
    """What a fresh module shows after loading some weights and processing them once."""

    loaded: dict[str, Tensor]
    outputs: Mapping[str, Tensor]
    answer: list[Any]
    #: Torch operators which processing takes at most, and which loading each tensor takes.
    processing: int
    loading: Mapping[str, int]


def switched(aliasing: bool) -> AbstractContextManager[None]:
    return nullcontext() if aliasing else without_aliasing()
