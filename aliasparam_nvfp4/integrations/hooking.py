"""Hooks around functions of vLLM, in the form of SGLang's: ``hook(original, *args, **kwargs)`` is called instead."""

from __future__ import annotations

import functools
import pkgutil
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

Hook: TypeAlias = Callable[..., Any]
#: What was put in place.
_hooked: set[Any] = set()


def around(target: str, hook: Hook) -> None:
    """Put ``hook`` around the function at ``target``, also in every loaded module that imported it by name. Nothing the second
    time.

    Raises:
        AttributeError, ImportError: no such function, in this version of vLLM.
    """
    where, _, name = target.rpartition(".")
    holder: Any = pkgutil.resolve_name(where)
    original = getattr(holder, name)
    if original in _hooked:
        return

    @functools.wraps(original)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    _hooked.add(hooked)
    setattr(holder, name, hooked)
    if isinstance(holder, type):
        return
    for other in list(sys.modules.values()):
        if getattr(other, "__dict__", {}).get(name) is original:
            setattr(other, name, hooked)


def missing(targets: Iterable[str]) -> list[str]:
    """Where :func:`around` has not been, or somebody else after it."""
    return [target for target in targets if not _is_hooked(target)]


def _is_hooked(target: str) -> bool:
    try:
        return pkgutil.resolve_name(target) in _hooked
    except (AttributeError, ImportError):
        return False


def becomes(ours: type) -> Hook:
    """A hook around a class's ``__init__``: objects of this very class, and of no subclass, become ``ours``."""

    def init(original: Any, made: Any, *args: Any, **kwargs: Any) -> None:
        if getattr(vars(type(made)).get("__init__"), "__wrapped__", None) is original:
            made.__class__ = ours
            made.__init__(*args, **kwargs)
        else:
            original(made, *args, **kwargs)

    return init
