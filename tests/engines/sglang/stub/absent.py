"""Packages that SGLang imports and that have no build for a CPU: every name can be imported, none can be called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn


class Absent(type):
    """A class, so that it can stand in annotations, in base lists and as an enum, that cannot be called."""

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{cls.__module__}.{cls.__name__} has no build for a CPU here")

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(name, (), {"__module__": f"{cls.__module__}.{cls.__name__}"})


def names_of(module: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module."""

    def getattr_(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(name, (), {"__module__": module})

    return getattr_
