"""The forward pre-hook of every declared module: it refuses while the module is open (law 8).

On a ready module it costs one look at the registry and at each name. Compiled callers do not run it: for them the
kernel names themselves refuse, see [Note: open modules] in storage/kernel_name.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import StaleKernelError
from ..tensors.dispatch import traced_by_jit
from ..torch_private import is_traced_by_jit
from .names import READY, Readiness
from .registry import AliasRegistry
from .registry_of import registry_of


def guard(module: nn.Module, args: Any) -> None:
    """Raises StaleKernelError for a module that is open, or whose names were replaced."""
    if torch.compiler.is_compiling():
        return
    registry = registry_of(module)
    if registry is None:
        return
    if is_traced_by_jit():
        raise traced_by_jit(module=registry.label)
    if registry.readiness is not READY or not registry.is_bound:
        _refuse(registry)


def _refuse(registry: AliasRegistry) -> None:
    if registry.readiness is Readiness.CLOSED and registry.holder is not None:
        session = registry.holder()
        if session is not None and session.drain.lets_through():
            return
    registry.close_if_unchanged()
    replaced = registry.replaced_names()
    if (registry.readiness is Readiness.READY and not replaced) or not registry.kernel_names():
        return
    raise StaleKernelError(
        "called while a declared name holds a tensor that was not taken in yet" if replaced else "called while it is open",
        module=registry.label,
        name=", ".join(replaced or registry.stale_names()) or None,
        expected="a module processed since the last write to its names",
        found="another tensor under the name" if replaced else "names written and not processed since",
        remedy="Call aliasparam.process(model) after loading.",
    )
