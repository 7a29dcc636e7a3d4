"""MoE runners by name. Every file of this folder which does not start with an underscore defines one ``RUNNER``."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

import torch

from ...errors import BackendError
from ..activation import SWIGLU, ExpertActivation
from ._base import MoENames as MoENames
from ._base import MoERunner as MoERunner
from ._base import MoEShape as MoEShape


@cache
def moe_runners() -> dict[str, MoERunner]:
    """All MoE runners by public name."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {m.RUNNER.name: m.RUNNER for m in modules}


def moe_runner(
    name: str,
    device: torch.device | None = None,
    *,
    activation: ExpertActivation = SWIGLU,
    input_scale: bool = True,
) -> MoERunner:
    """The runner called ``name``; ``auto`` takes the highest-ranked that serves such experts on ``device`` (default: what
    this process has).

    Raises:
        BackendError: no such runner, or one which cannot serve such experts.
    """
    known = moe_runners()
    fit = {n: r for n, r in known.items() if r.refusal(activation, input_scale=input_scale) is None}
    if name == "auto":
        here = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return max((r for r in fit.values() if r.unavailable(here) is None), key=lambda r: r.rank)
    if name not in known:
        raise BackendError("unknown MoE runner", name=name, expected=f"auto or one of {sorted(known)}", found=repr(name))
    if name not in fit:
        raise BackendError(
            f"this runner cannot serve these experts: {known[name].refusal(activation, input_scale=input_scale)}",
            name=name,
            expected=f"auto or one of {sorted(fit)}",
            found=activation,
        )
    return known[name]
