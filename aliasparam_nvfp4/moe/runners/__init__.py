"""MoE runners by name. Every file of this folder which does not start with an underscore defines one ``RUNNER``."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

import torch

from ...errors import BackendError
from ...kernels.choice import choose
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
    dynamic: bool = False,
    bias: bool = False,
) -> MoERunner:
    """The runner called ``name``; ``auto`` takes the highest-ranked that serves such experts on ``device`` (default: what
    this process has).

    Raises:
        BackendError: no such runner, or one which cannot serve such experts.
    """
    return chosen(name, device, activation=activation, input_scale=input_scale, dynamic=dynamic, bias=bias)[0]


def chosen(
    name: str,
    device: torch.device | None = None,
    *,
    activation: ExpertActivation = SWIGLU,
    input_scale: bool = True,
    dynamic: bool = False,
    bias: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[MoERunner, str]:
    """(runner, why it is that one). Dims do not matter: runners pad what their kernels want in whole tiles.

    Raises:
        BackendError: no such runner, or one which cannot serve such experts.
    """

    needs: dict[str, Any] = {"input_scale": input_scale, "dynamic": dynamic, "bias": bias}

    def misfit(runner: MoERunner) -> str | None:
        return runner.refusal(activation, dtype=dtype, **needs)

    runner, reason = choose("MoE runner", moe_runners(), name, device, misfit)
    if (refusal := runner.refusal(activation, **needs)) is not None:
        known = moe_runners().items()
        fit = [n for n, r in known if r.refusal(activation, **needs) is None]
        raise BackendError(
            f"this runner cannot serve these experts: {refusal}",
            name=name,
            expected=f"auto or one of {fit}",
            found=activation,
        )
    return runner, reason
