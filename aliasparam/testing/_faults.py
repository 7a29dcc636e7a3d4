"""Failures at any operator: of a layout, a loader, a derivation, the middle of a write."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from ..tensors.dispatch import dispatch
from ..tensors.faces import _Aliased


class Fault(RuntimeError):
    """The failure that :class:`FailingAt` injects."""


class FailingAt(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts torch operators inside the block, and raises :class:`Fault` in the place of one of them.

    Args:
        at: which, from 0; None only counts.

    Attributes:
        count: operators seen.
        failed: the operator that failed, or None.
    """

    def __init__(self, at: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.at, self.count, self.failed = at, 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(cls, _Aliased) for cls in types):
            with self:  # what the library does for a name is operators too
                return dispatch(func, args, kwargs or {})
        if self.count == self.at:
            self.count += 1
            self.failed = str(func)
            raise Fault(f"injected in the place of {func}")
        self.count += 1
        return func(*args, **(kwargs or {}))
