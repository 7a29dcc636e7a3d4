"""One kernel call, several projections: the parts of a fused output which nobody has asked for yet."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from aliasparam import registry_of

#: What an output depends on: see :func:`question`.
Question = tuple[Any, ...]


class Pending:
    """The output of a fused layer for one input. Each part is handed out once, and to the very same question alone.

    Neither the input is kept alive nor, once it is gone, any output.
    """

    def __init__(self, x: Tensor, asked: Question, parts: list[Tensor | None]) -> None:
        self._x = weakref.ref(x, lambda _: parts.clear())
        self._asked = asked
        self._parts = parts

    def take(self, x: Tensor, asked: Question, index: int) -> Tensor | None:
        """Part ``index`` for this input, or None where it must be computed (again)."""
        if self._x() is not x or self._asked != asked or not self._parts:
            return None
        part, self._parts[index] = self._parts[index], None
        return part

    @property
    def is_empty(self) -> bool:
        return not any(part is not None for part in self._parts)


def question(layer: nn.Module, x: Tensor) -> Question | None:
    """The input's address and version, the generations of all weights and derivations, the backend, and whether gradients are
    recorded. None where a change could not be seen: inference tensors have no version, traced and wrapped ones no address, and
    stale names must be refused by the forward itself.

    Not seen either: a write through ``x.data`` between the calls of two projections.
    """
    registry = registry_of(layer)
    if registry is None or not registry.is_ready or type(x) is not Tensor or x.is_inference() or torch.compiler.is_compiling():
        return None
    weights = tuple(s.storage.version if s.storage is not None else -1 for s in registry.sources.values())
    derived = tuple(d.version for d in registry.derived.values())
    return x.data_ptr(), x._version, weights, derived, layer.__dict__["nvfp4_backend"].name, torch.is_grad_enabled()
