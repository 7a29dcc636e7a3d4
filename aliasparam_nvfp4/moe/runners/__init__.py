"""MoE runners by name. Every file of this folder which does not start with an underscore defines one ``RUNNER``."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

import torch

from ...errors import BackendError
from ._base import MoENames as MoENames
from ._base import MoERunner as MoERunner
from ._base import MoEShape as MoEShape


@cache
def moe_runners() -> dict[str, MoERunner]:
    """All MoE runners by public name."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {m.RUNNER.name: m.RUNNER for m in modules}


def moe_runner(name: str, device: torch.device | None = None) -> MoERunner:
    """The runner called ``name``; ``auto`` takes the highest-ranked that runs on ``device`` (default: what this process has).

    Raises:
        BackendError: no such runner.
    """
    known = moe_runners()
    if name == "auto":
        here = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return max((r for r in known.values() if r.unavailable(here) is None), key=lambda r: r.rank)
    if name not in known:
        raise BackendError("unknown MoE runner", name=name, expected=f"auto or one of {sorted(known)}", found=repr(name))
    return known[name]
