"""What lies between an expert's two GEMMs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ShapeError


@dataclass(frozen=True)
class ExpertActivation:
    """An activation, gated or not.

    ``swiglu`` is ``gate * sigmoid(alpha * gate) * (up + beta)`` with ``gate`` held below ``limit`` and ``up`` between
    ``-limit`` and ``limit`` first (gpt-oss); with the defaults it is ``silu(gate) * up``. ``relu2`` is not gated:
    ``relu(x)**2`` (Nemotron), of w1 alone. ``geglu`` is ``gelu(gate) * up`` with the tanh form of GELU (Gemma).

    Raises:
        ShapeError: an unknown kind, or numbers that only ``swiglu`` has.
    """

    kind: Literal["swiglu", "geglu", "relu2"] = "swiglu"
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("swiglu", "geglu", "relu2"):
            raise ShapeError("unsupported activation of experts", expected="swiglu, geglu or relu2", found=repr(self.kind))
        if self.kind != "swiglu" and self.has_numbers:
            raise ShapeError(f"{self.kind} has no alpha, beta or limit", expected="the defaults", found=self)
        if self.limit is not None and self.limit <= 0:
            raise ShapeError("the limit of an activation is positive", expected="> 0", found=self.limit)

    @property
    def gated(self) -> bool:
        """Whether w13 has up rows besides those of the gate."""
        return self.kind != "relu2"

    @property
    def has_numbers(self) -> bool:
        """Whether it is more than plain SwiGLU."""
        return (self.alpha, self.beta, self.limit) != (1.0, 0.0, None)

    def __call__(self, gate: Tensor, up: Tensor | None) -> Tensor:
        """Both in float32, true values (scales multiplied in); ``up`` is None where there is none."""
        if up is None:
            return torch.relu(gate).square()
        if self.kind == "geglu":
            return functional.gelu(gate, approximate="tanh") * up
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + self.beta)


SWIGLU = ExpertActivation()
GEGLU = ExpertActivation("geglu")
RELU2 = ExpertActivation("relu2")
