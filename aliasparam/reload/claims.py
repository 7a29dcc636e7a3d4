"""One session a module."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from ..errors import ReloadError
from ..module.registry_of import registries

#: Which session has a module. Neither keeps the other alive, so an abandoned session frees its modules.
_sessions: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def claim(model: nn.Module, session: object) -> None:
    """``session`` has every module of ``model`` until :func:`release`; meanwhile nothing else processes them.

    Raises:
        ReloadError: another session that is alive has one of them.
    """
    modules = list(model.modules())
    for module in modules:
        other = _sessions.get(module)
        if other is not None and other() not in (None, session):
            raise ReloadError(
                "a reload of this model is already open",
                module=type(model).__name__,
                expected="one reload at a time",
                found=f"another one, of {type(module).__name__}, in progress",
                remedy="Finish or abort it first.",
            )
    reference = weakref.ref(session)
    for module in modules:
        _sessions[module] = reference
    for _, registry in registries(model):
        registry.holder = reference


def release(model: nn.Module, session: object) -> None:
    """Undo :func:`claim`. Modules that another session has stay as they are."""
    for module in model.modules():
        if module in _sessions and _sessions[module]() is session:
            del _sessions[module]
    for _, registry in registries(model):
        if registry.holder is not None and registry.holder() in (None, session):
            registry.holder = None
