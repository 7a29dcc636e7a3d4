"""The guard of a module: what refuses its forward and its kernel names while anything it declared is stale (law 8).

It exists only while something is stale, so a ready module pays nothing: no hook, and plain tensors under the kernel names.

[Note: guard and threads] A loader's thread marks stale while another one settles. Both hold the guard's lock, and states change
before anybody marks: whoever comes second sees what the first one did. Nothing else is locked inside.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from torch import nn

from ._compiled import refused_when_traced
from .errors import StaleKernelError

if TYPE_CHECKING:
    from ._names import RegistryNames


class Guard:
    """The forward pre-hook and the stand-ins of one registry."""

    def __init__(self, registry: RegistryNames) -> None:
        self._registry = registry
        self._hook: Any = None
        #: Something was put under a declared name. Whether it stays there is seen at the next forward or verb.
        self._suspicious = False
        self._lock = threading.RLock()

    @property
    def is_up(self) -> bool:
        return self._hook is not None

    def mark_stale(self) -> None:
        """A checkpoint name changed, or is about to."""
        with self._lock:
            if self._hook is None and self._registry.kernel_names():
                self._hook = self._registry.module.register_forward_pre_hook(self._refuse, prepend=True)
                self._registry.show_kernel_names()

    def suspect(self) -> None:
        """Something was put under a declared name."""
        self._suspicious = True
        self.mark_stale()

    def settle(self) -> None:
        """Let the module run again once every kernel name is current."""
        with self._lock:
            if self._suspicious and not self._registry.replaced_names():
                self._suspicious = False
            if self._hook is not None and not self._suspicious and not self._registry.stale_names():
                self._hook.remove()
                self._hook = None
                self._registry.show_kernel_names()

    def look_again(self) -> None:
        """Settle if it was only a suspicion."""
        if self._suspicious:
            self.settle()

    def _refuse(self, module: nn.Module, args: Any) -> None:
        self.settle()  # another module that shows the same storage may have processed it
        if self._hook is None:
            return
        registry = self._registry
        replaced = registry.replaced_names()
        raise StaleKernelError(
            "called while a declared name holds a tensor that was not taken in yet"
            if replaced
            else "called while kernel-format names are stale",
            module=registry.label,
            name=", ".join(replaced or registry.stale_names()) or None,
            expected="names processed since the last write to their sources",
            found="another tensor under the name" if replaced else "names that are older than their sources",
            remedy="Call aliasparam.process(model) after loading.",
        )

    refused_when_traced(_refuse, "kernel-format names are stale: call aliasparam.process(model) after loading")

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()
