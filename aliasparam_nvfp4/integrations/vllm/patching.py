"""Replacing a function of vLLM wherever its modules hold it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any


def replace(module: Any, name: str, make: Callable[[Any], Any]) -> None:
    """``module.name = make(original)``, also in every loaded module that imported it by name. Nothing the second time.

    Args:
        module: a module, or a class (then the name is an attribute of it alone).
        name: the function.
        make: gives what stands for it, from the original.

    Raises:
        AttributeError: no such function, in this version of vLLM.
    """
    original = getattr(module, name)
    if hasattr(original, "_aliasparam_original"):
        return
    new: Any = functools.wraps(original)(make(original))
    new._aliasparam_original = original
    setattr(module, name, new)
    if isinstance(module, type):
        return
    for other in list(sys.modules.values()):
        if getattr(other, "__dict__", {}).get(name) is original:
            setattr(other, name, new)


def is_replaced(module: Any, name: str) -> bool:
    """Whether :func:`replace` has been here, and nobody after it."""
    return hasattr(getattr(module, name, None), "_aliasparam_original")
