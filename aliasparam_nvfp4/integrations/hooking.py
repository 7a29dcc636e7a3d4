"""Hooks around functions of an engine: ``hook(original, *args, **kwargs)`` is called instead."""

from __future__ import annotations

import functools
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from logging import Logger
from typing import Any, TypeAlias

from torch import nn

from .plugins import Engine
from .serving import said_of

Hook: TypeAlias = Callable[..., Any]
#: What was put in place, and every place that was to have one.
_hooked: set[Any] = set()
_wanted: set[str] = set()


def around(target: str, hook: Hook) -> None:
    """Put ``hook`` around the function at ``target``, also in every loaded module that imported it by name. Nothing the second
    time.

    Raises:
        AttributeError, ImportError: no such function, in this version of the engine.
    """
    where, _, name = target.rpartition(".")
    holder: Any = pkgutil.resolve_name(where)
    original = getattr(holder, name)
    if any(one in _hooked for one in _chain(original)):
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


def _chain(function: Any) -> Iterator[Any]:
    """It and what it is wrapped around: others may hook what is hooked here."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def becomes(ours: type, when: Callable[..., bool] = lambda *args, **kwargs: True) -> Hook:
    """A hook around a class's ``__init__``: objects of this very class, and of no subclass, become ``ours``, where ``when`` says
    so of the arguments."""

    def init(original: Any, made: Any, *args: Any, **kwargs: Any) -> None:
        very = any(one is original for one in _chain(vars(type(made)).get("__init__")))
        if very and when(*args, **kwargs):
            made.__class__ = ours
            made.__init__(*args, **kwargs)
        else:
            original(made, *args, **kwargs)

    return init


def put_in_place(engine: Engine, hooks: Callable[[], Mapping[str, Hook]], logger: Logger) -> bool:
    """All of an engine's hooks, or none; nothing but one line in the log with a version of it that is not known.

    Raises:
        AttributeError, ImportError: as :func:`around`.
    """
    if (reason := engine.doubt()) is not None:
        logger.warning("aliasparam_nvfp4 is not in place: %s", reason)
        return False
    wanted = hooks()
    _wanted.update(wanted)
    for target in wanted:
        pkgutil.resolve_name(target)
    for target, hook in wanted.items():
        around(target, hook)
    return True


def say_what_serves(model: nn.Module, logger: Logger) -> bool:
    """A line in the log when a model was loaded, for engines only log plugins that fail. Whether anything of it is ours."""
    line = said_of(model)
    if line is not None:
        logger.info(line)
    if left := missing(sorted(_wanted)):  # of our classes too, and then nothing of the model is ours
        logger.error("aliasparam_nvfp4 is in place in part only; missing: %s", ", ".join(left))
    return line is not None
