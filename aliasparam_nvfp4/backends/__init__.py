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


def linear_backend(name: str, device: torch.device | None = None) -> LinearBackend:
    """The backend called ``name``; ``auto`` picks the best that runs on ``device`` (default: what this process has).

    Raises:
        BackendError: no such backend.
    """
    known = linear_backends()
    if name == "auto":
        here = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        runnable = [b for b in known.values() if b.unavailable(here) is None]
        return max(runnable, key=lambda b: b.rank)
    if name not in known:
        raise BackendError("unknown linear backend", name=name, expected=f"auto or one of {sorted(known)}", found=repr(name))
    return known[name]


def why(device: torch.device) -> str:
    """One line per backend: runs here, or why not."""
    rows = ((b.name, b.unavailable(device)) for b in linear_backends().values())
    return "\n".join(f"{name:<22}{'runs here' if reason is None else reason}" for name, reason in rows)
