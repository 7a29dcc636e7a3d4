"""Choosing a linear backend or an MoE runner by name, or the best that fits; and whether it runs on a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import torch

from ..errors import BackendError


class Runnable(Protocol):
    """A linear backend or an MoE runner."""

    name: str

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run on ``device``, or None where it can."""


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


#: Found out once, because every forward asks.
_reasons: dict[tuple[Runnable, torch.device], str | None] = {}


def need_running(runnable: Runnable, device: torch.device, what: str = "backend") -> None:
    """Raise BackendError where ``runnable`` (called ``what`` in the message) cannot run on ``device``."""
    key = (runnable, device)
    if key not in _reasons:
        _reasons[key] = runnable.unavailable(device)
    if (reason := _reasons[key]) is not None:
        raise BackendError(
            f"this {what} cannot run here", name=runnable.name, found=reason, remedy='Use backend="reference" or "auto".'
        )
