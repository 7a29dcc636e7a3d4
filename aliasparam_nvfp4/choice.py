"""Choosing a linear backend or an MoE runner by name, or the best that fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import torch

from .availability import Runnable
from .errors import BackendError


class Ranked(Runnable, Protocol):
    """``auto`` takes the highest rank."""

    rank: int


_Ranked = TypeVar("_Ranked", bound=Ranked)


def choose(
    what: str,
    known: Mapping[str, _Ranked],
    name: str,
    device: torch.device | None,
    misfit: Callable[[_Ranked], str | None],
) -> tuple[_Ranked, str]:
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
