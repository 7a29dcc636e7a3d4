"""Whether an engine's step failed because the model refuses to run: such a step fails its requests, and not the engine."""

from __future__ import annotations

import weakref

from torch import nn

from aliasparam import AliasRegistry
from aliasparam.errors import StateError
from aliasparam.module.names import READY
from aliasparam.module.registry import registries
from aliasparam.module.verbs import guard

#: What the text of a refusal that a worker sends begins with, and what torch.compile says where it meets one while it traces.
SENT, _TRACED = "aliasparam_nvfp4 refused: ", "a kernel-format name is open"
#: Layers of this package in each model that ran.
_declared: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[AliasRegistry]]] = weakref.WeakKeyDictionary()


def is_refusal(error: BaseException | None) -> bool:
    """Whether the model refused to run; what went wrong otherwise is the engine's to judge."""
    while error is not None:
        if isinstance(error, StateError) or SENT in str(error) or _TRACED in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def need_runnable(model: nn.Module) -> None:
    """What every layer of this package asks before its forward, of all at once: code that an engine compiles without guards, and
    graphs that it captured, run without asking.

    Raises:
        StateError: a layer refuses.
    """
    found = _declared.get(model)
    if found is None:
        found = _declared[model] = [weakref.ref(registry) for _, registry in registries(model)]
    for reference in found:
        registry = reference()
        if registry is not None and registry.readiness is not READY:
            guard(registry.module, ())
