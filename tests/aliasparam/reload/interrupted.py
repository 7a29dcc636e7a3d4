"""An interrupt (Ctrl-C) between any two lines of some modules."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any

import torch


def interrupted(at: int, modules: tuple[ModuleType, ...], do: Callable[[], object]) -> bool:
    """Whether ``do()`` came to line number ``at``, from 0, of what it runs in ``modules``, and was interrupted there.

    CPython traces the line of a ``with`` once more before it leaves it: an interrupt there skips ``no_grad``'s exit.
    """
    files, left = {module.__file__ for module in modules}, at

    def line(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        left -= event == "line"
        if left < 0:
            sys.settrace(None)
            raise KeyboardInterrupt
        return line

    def call(frame: FrameType, *_: object) -> Any:
        called_by_finalizers = frame.f_code.co_name in ("__del__", "abandon")  # what is raised there, Python ignores
        return line if frame.f_code.co_filename in files and not called_by_finalizers else None

    before = sys.gettrace()
    try:
        sys.settrace(call)
        with torch.enable_grad():
            do()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False
