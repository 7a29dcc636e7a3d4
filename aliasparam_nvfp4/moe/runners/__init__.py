"""MoE runners by name. Every file of this folder which does not start with an underscore defines one ``RUNNER``."""

from __future__ import annotations

from typing import Unpack

import torch

from ...errors import BackendError
from ...kernels.base import kernels_in
from ...kernels.choice import choose
from ..activation import SWIGLU
from ._base import MoENames as MoENames
from ._base import MoERunner as MoERunner
from ._base import MoEShape as MoEShape
from ._base import Needs as Needs
from ._base import needs_of as needs_of


def moe_runners() -> dict[str, MoERunner]:
    """All MoE runners by public name."""
    return kernels_in(MoERunner.folder, MoERunner.constant)


def moe_runner(name: str, device: torch.device | None = None, **needs: Unpack[Needs]) -> MoERunner:
    """The runner called ``name``; ``auto`` takes the highest-ranked that serves such experts on ``device`` (default: what
    this process has).

    Raises:
        BackendError: no such runner, or one which cannot serve such experts.
    """
    return chosen(name, device, **needs)[0]


def chosen(
    name: str, device: torch.device | None = None, dtype: torch.dtype | None = None, **needs: Unpack[Needs]
) -> tuple[MoERunner, str]:
    """(runner, why it is that one). Dims do not matter: runners pad what their kernels want in whole tiles.

    Raises:
        BackendError: no such runner, or one which cannot serve such experts.
    """
    wanted: Needs = {"activation": SWIGLU, **needs}
    runner, reason = choose("MoE runner", moe_runners(), name, device, lambda r: r.refusal(**wanted, dtype=dtype))
    if (refusal := runner.refusal(**wanted)) is not None:
        raise BackendError(
            f"this runner cannot serve these experts: {refusal}",
            name=name,
            expected=f"auto or one of {[n for n, r in moe_runners().items() if r.refusal(**wanted) is None]}",
            found=wanted["activation"],
        )
    return runner, reason
