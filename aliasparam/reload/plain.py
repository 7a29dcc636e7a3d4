"""Refusing twins of plain parameters and buffers: while a reload writes a norm or an embedding nobody may read it.

As for kernel names, a hook would not do: compiled callers do not look at hooks of inner modules. The twin stands in the module's
dict in the tensor's place; its other type fails the guards of compiled code, and after the commit the very same tensor is back.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from ..errors import StaleKernelError
from ..storage.kernel_name import KernelName, RefusingName


class PlainName(KernelName):
    """A plain tensor of a model under reload."""

    def __init__(self, label: str, live: Tensor) -> None:
        super().__init__(label, live.data)
        self.live = live

    def refusal(self) -> StaleKernelError:
        return StaleKernelError(
            "this tensor is being reloaded, or its reload failed",
            label=self.label,
            expected="a committed reload",
            found="one that was not committed",
            remedy="Finish the reload, or reload the whole model; until then it does not run.",
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> PlainName:
        if id(self) not in memo:
            memo[id(self)] = PlainName(self.label, copy.deepcopy(self.live, memo))
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce__(self) -> Any:
        return PlainName, (self.label, self.live)


def live_of(shown: Tensor) -> Tensor:
    """The tensor that a module's dict shows, also where its twin stands there."""
    name = shown._alias_name if isinstance(shown, RefusingName) else None
    return name.live if isinstance(name, PlainName) else shown
