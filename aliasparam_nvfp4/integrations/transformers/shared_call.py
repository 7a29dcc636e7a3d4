"""One kernel call, several projections, within one forward of the module that owns them.

A parent (attention, an MLP) asks its projections one after the other for the same input. During the parent's forward, and in its
thread alone, the outputs that nobody has asked for yet are kept in its frame. Outside of one nothing is kept.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from aliasparam import registry_of


class Frame:
    """A forward of ``parent`` that runs; ``outer`` is the one it runs in. ``kept``: by fused layer, (input, what its output
    depends on, outputs of the partitions that are still to be asked for)."""

    def __init__(self, parent: nn.Module, outer: Frame | None) -> None:
        self.parent, self.outer = parent, outer
        self.kept: dict[nn.Module, tuple[Tensor, tuple[Any, ...], dict[int, Tensor]]] = {}


_running: ContextVar[Frame | None] = ContextVar("a forward that shares kernel calls", default=None)


def share_calls(parent: nn.Module) -> None:
    """Let the fused layers of ``parent`` keep outputs during its forward."""
    if _enter not in parent._forward_pre_hooks.values():
        parent.register_forward_pre_hook(_enter)
        parent.register_forward_hook(_leave, always_call=True)


def _enter(parent: nn.Module, _: Any) -> None:
    if not torch.compiler.is_compiling():
        _running.set(Frame(parent, _running.get()))


def _leave(parent: nn.Module, _: Any, __: Any) -> None:
    if not torch.compiler.is_compiling():
        frame = _running.get()
        if frame is not None and frame.parent is parent:
            _running.set(frame.outer)


def partition(fused: nn.Module, sizes: tuple[int, ...], x: Tensor, index: int) -> Tensor:
    """The columns of partition ``index`` of ``fused(x)``: kept from a call for the same input, or computed."""
    frame = None if torch.compiler.is_compiling() else _running.get()
    state = None if frame is None else _depends_on(fused, x)
    if frame is None or state is None:
        return fused(x).split(sizes, -1)[index]  # type: ignore[no-any-return]
    of, when, parts = frame.kept.get(fused, (None, None, {}))
    if of is not x or when != state or index not in parts:
        parts = dict(enumerate(fused(x).split(sizes, -1)))
        frame.kept[fused] = x, state, parts
    part = parts.pop(index)
    if not parts:
        del frame.kept[fused]
    return part


def _depends_on(layer: nn.Module, x: Tensor) -> tuple[Any, ...] | None:
    """What an output depends on beside the input's identity. None where a change could not be seen: inference tensors have no
    version, wrapped ones no memory, and stale names must be refused by the forward itself."""
    registry = registry_of(layer)
    if registry is None or not registry.is_ready or type(x) is not Tensor or x.is_inference():
        return None
    weights = tuple(s.storage.version if s.storage is not None else -1 for s in registry.sources.values())
    derived = tuple(d.version for d in registry.derived.values())
    return x.data_ptr(), x._version, weights, derived, layer.__dict__["nvfp4_backend"].name, torch.is_grad_enabled()
