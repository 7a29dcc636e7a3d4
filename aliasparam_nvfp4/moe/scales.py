"""The scalars of MoE kernels, as derivations.

With ``a1 = max(w13_input_scale)`` and ``a2 = max(w2_input_scale)`` over *all* experts of all ranks (so that ranks agree),
``s13[e] = w13_weight_scale_2[e]`` (column 0 gate, 1 up) and ``s2[e] = w2_weight_scale_2[e]``:

| kind | g1_alphas | g1_scale_c | g2_alphas | w13_input_scale_quant | w2_input_scale_quant |
|---|---|---|---|---|---|
| quantized | ``a1 * s13[e, 0]`` | ``a1 * s13[e, 1] / a2`` | ``a2 * s2[e]`` | ``1 / a1`` | ``1 / a2`` |
| per expert | ``a1[e] * s13[e, 0]`` | ``a1[e] * s13[e, 1] / a2[e]`` | ``a2[e] * s2[e]`` | ``1 / a1[e]`` | ``1 / a2[e]`` |
| as they are | ``s13[e, 0]`` | ``s13[e, 1]`` | ``s2[e]`` | none | none |
| divided | ``s13[e, 0]`` | none | ``a2 * s2[e]`` | none | none |

``per expert`` takes each expert's own input scales. All are f32 ``[E]``, except the quants of the first row, ``[1]``.
``as they are`` has ``g1_alphas_gate_up`` too: both columns of ``s13``, ``[E, 2]``, for kernels that take them as one tensor.
``divided`` is for kernels that divide by an input scale and multiply it back into the first GEMM's factor themselves: it has
``w13_input_scale_max = a1`` and ``w2_input_scale_max = a2``, ``[1]``.
A runner with one factor for gate and up cannot serve an expert whose two weight scales differ; it refuses it by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from aliasparam import Derivation

from ..errors import ScaleError

Activation = Literal["quantized", "per expert", "as they are", "divided"]


@dataclass(frozen=True)
class MoEScales:
    """The derivations of one runner on one rank.

    Attributes:
        activation: how activations meet their scales.
        runner: for messages.
        untied: whether gate and up of an expert may have different weight scales.
        first_expert: global number of this rank's first expert.
        experts: experts of this rank.
    """

    activation: Activation
    runner: str
    untied: bool
    first_expert: int
    experts: int

    def derivations(self) -> list[Derivation]:
        """Refreshed by ``process`` whenever a source was written."""
        per_expert, f32 = (self.experts,), torch.float32
        s13, s2, a1, a2 = "w13_weight_scale_2", "w2_weight_scale_2", "w13_input_scale", "w2_input_scale"
        if self.activation == "as they are":
            return [
                Derivation("g1_alphas", (s13,), self._gate, per_expert, f32),
                Derivation("g1_scale_c", (s13,), self._up, per_expert, f32),
                Derivation("g1_alphas_gate_up", (s13,), self._gate_up, (self.experts, 2), f32),
                Derivation("g2_alphas", (s2,), self._down, per_expert, f32),
            ]
        if self.activation == "divided":
            return [
                Derivation("g1_alphas", (s13,), self._gate, per_expert, f32),
                Derivation("g2_alphas", (a2, s2), lambda a, s: self._combined(a) * self._down(s), per_expert, f32),
                Derivation("w13_input_scale_max", (a1,), self._combined, (1,), f32),
                Derivation("w2_input_scale_max", (a2,), self._combined, (1,), f32),
            ]
        quants = per_expert if self.activation == "per expert" else (1,)
        return [
            Derivation("w13_input_scale_quant", (a1,), self._inverse, quants, f32),
            Derivation("w2_input_scale_quant", (a2,), self._inverse, quants, f32),
            Derivation("g1_alphas", (a1, s13), lambda a, s: self._combined(a) * self._gate(s), per_expert, f32),
            Derivation(
                "g1_scale_c",
                (a1, s13, a2),
                lambda a, s, b: self._combined(a) * self._up(s) / self._combined(b),
                per_expert,
                f32,
            ),
            Derivation("g2_alphas", (a2, s2), lambda a, s: self._combined(a) * self._down(s), per_expert, f32),
        ]

    def _combined(self, scales: Tensor) -> Tensor:
        """Input scales ``[E_global]`` or ``[E_global, 2]`` as ``[1]``, or ``[E]`` of this rank's experts."""
        self._need("an input scale", scales)
        if self.activation != "per expert":
            return scales.max().reshape(1)
        own = scales[self.first_expert : self.first_expert + self.experts]
        return own.amax(-1) if own.dim() == 2 else own.clone()

    def _inverse(self, scales: Tensor) -> Tensor:
        return 1.0 / self._combined(scales)

    def _gate(self, s13: Tensor) -> Tensor:
        self._need("a weight global scale", s13)
        differing = (s13[:, 0] != s13[:, 1]).nonzero().flatten().tolist()
        if differing and not self.untied:
            expert = differing[0]
            raise ScaleError(
                f"gate and up of {len(differing)} experts have different weight global scales, and this runner has one factor",
                name=f"{self.runner}: w13_weight_scale_2, expert {self.first_expert + expert}",
                expected="equal values",
                found=s13[expert].tolist(),
                remedy="Use flashinfer_trtllm, flashinfer_cutile or reference, or export with unified scales.",
            )
        return s13[:, 0].clone()

    def _up(self, s13: Tensor) -> Tensor:
        self._need("a weight global scale", s13)
        return s13[:, 1].clone()

    def _gate_up(self, s13: Tensor) -> Tensor:
        self._need("a weight global scale", s13)
        return s13.clone()

    def _down(self, s2: Tensor) -> Tensor:
        self._need("a weight global scale", s2)
        return s2.clone()

    def _need(self, what: str, values: Tensor) -> None:
        wrong = ~(torch.isfinite(values) & (values > 0))
        if bool(wrong.any()):
            expert = int(wrong.nonzero()[0, 0])
            raise ScaleError(
                f"{what} is not a scale", name=f"expert {expert}", expected="finite, > 0", found=values[expert].tolist()
            )
