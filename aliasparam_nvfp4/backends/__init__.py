"""Backends by name. Every file of this folder which does not start with an underscore defines one ``BACKEND``."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

import torch

from ..errors import BackendError
from ._base import KernelNames as KernelNames
from ._base import LinearBackend as LinearBackend
from ._base import LinearLayout as LinearLayout
from ._base import LinearShape as LinearShape


@cache
def linear_backends() -> dict[str, LinearBackend]:
    """All linear backends by public name."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {m.BACKEND.name: m.BACKEND for m in modules}


def linear_backend(name: str, device: torch.device | None = None, *, input_scale: bool = True) -> LinearBackend:
    """The backend called ``name``; ``auto`` picks the best that runs on ``device`` (default: what this process has), and that
    does without activation scales where there are none.

    Raises:
        BackendError: no such backend.
    """
    known = linear_backends()
    if name == "auto":
        fit = [b for b in _runnable(device) if input_scale or not b.needs_input_scale]
        return max(fit, key=lambda b: b.rank)
    if name not in known:
        raise BackendError("unknown linear backend", name=name, expected=f"auto or one of {sorted(known)}", found=repr(name))
    return known[name]


def _runnable(device: torch.device | None) -> list[LinearBackend]:
    here = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [b for b in linear_backends().values() if b.unavailable(here) is None]


def why(device: torch.device) -> str:
    """One line per backend, best first: which ``auto`` takes, which run here too, and why the others do not."""
    chosen = linear_backend("auto", device)
    lines = []
    for backend in sorted(linear_backends().values(), key=lambda b: -b.rank):
        reason = backend.unavailable(device)
        verdict = "auto takes it: the first that runs here" if backend is chosen else "runs here" if reason is None else reason
        lines.append(f"{backend.name:<32}{verdict}")
    return "\n".join(lines)
