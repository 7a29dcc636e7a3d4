"""Choosing a linear backend or an MoE runner by name, or the best that fits; and whether it runs on a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from ..errors import BackendError
from .base import Kernel

_Kernel = TypeVar("_Kernel", bound=Kernel)


def choose(
    what: str, known: Mapping[str, _Kernel], name: str, device: torch.device | None, misfit: Callable[[_Kernel], str | None]
) -> tuple[_Kernel, str]:
    """(the one called ``name``, why it is that one). ``auto`` takes the highest rank that runs on ``device`` and fits.

    Args:
        what: for messages.
        known: by name.
        name: one of them, or "auto".
        device: default: what this process has.
        misfit: why one cannot serve the layer, or None where it can. Not asked of one that was named: its error is its own.

    Raises:
        BackendError: no such name, or none that fits.
    """
    if name != "auto":
        if name not in known:
            raise BackendError(f"unknown {what}", name=name, expected=f"auto or one of {sorted(known)}", found=repr(name))
        return known[name], "asked for by name"
    here = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    passed: list[str] = []
    for candidate in sorted((c for c in known.values() if c.unavailable(here) is None), key=lambda c: -c.rank):
        if (reason := misfit(candidate)) is None:
            return candidate, "; not ".join([f"auto, the first that fits on {_called(here)}", *passed])
        passed.append(f"{candidate.name} ({reason})")
    raise BackendError(f"no {what} fits", name="auto", expected="reference at least", found="; ".join(passed))


def _called(device: torch.device) -> str:
    if device.type != "cuda":
        return f"the {device.type.upper()}"
    return "compute capability {}.{}".format(*torch.cuda.get_device_capability(device))


def need_running(kernel: Kernel, device: torch.device) -> None:
    """Raise BackendError where ``kernel`` cannot run on ``device``."""
    if (reason := kernel.lacks(device)) is not None:
        raise BackendError(
            f"this {kernel.what} cannot run here", name=kernel.name, found=reason, remedy='Use backend="reference" or "auto".'
        )
