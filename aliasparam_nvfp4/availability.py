"""Whether a backend or runner runs on a device: found out once, because every forward asks."""

from __future__ import annotations

from typing import Protocol

import torch

from .errors import BackendError


class Runnable(Protocol):
    """A linear backend or an MoE runner."""

    name: str

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run on ``device``, or None where it can."""


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
