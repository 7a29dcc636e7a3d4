"""The global scales of a layer's checkpoint, as what a kernel multiplies with: completed, combined and checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint.format import MODELOPT, CheckpointFormat
from ..errors import ScaleError
from ..quantize.global_scale import EXPECTED, are_scales
from ..quantize.missing import Missing, completed, is_dynamic


@dataclass(frozen=True)
class GlobalScales:
    """
    Attributes:
        runner: for messages.
        separate: whether gate and up of an expert may have different weight scales.
        gated: whether experts have a gate.
        each: whether every expert has input scales of its own; otherwise the largest of all counts for all.
        first_expert: global number of this rank's first expert.
        experts: experts of this rank.
        checkpoint: names, and the direction of the scales.
        missing: what counts for an expert without an input scale (0, or no number), see missing.py: "max" is what ModelOpt's
            exporter does for experts that met no token. Where it is "dynamic" and one of the layer's is missing, a kernel
            computes all of them: its quant is 0, and the factors have weight scales alone.
    """

    runner: str
    separate: bool
    gated: bool
    each: bool
    first_expert: int
    experts: int
    checkpoint: CheckpointFormat = MODELOPT
    missing: Missing = "refuse"

    @property
    def s13(self) -> str:
        return f"w13_{self.checkpoint.weight_global}"

    @property
    def s2(self) -> str:
        return f"w2_{self.checkpoint.weight_global}"

    @property
    def a1(self) -> str:
        return f"w13_{self.checkpoint.input_global}"

    @property
    def a2(self) -> str:
        return f"w2_{self.checkpoint.input_global}"

    def _combined(self, name: str, scales: Tensor) -> Tensor:
        """Input scales ``[E_global]`` or ``[E_global, 1 or 2]`` as ``[1]``, or ``[E]`` of this rank's experts, as stored."""
        if scales.numel() == 1:  # one for all experts
            scales = scales.reshape(1).expand(self.first_expert + self.experts)
        scales = completed(scales, self.missing, reciprocal=self.checkpoint.reciprocal)
        if not is_dynamic(self.missing) or bool(scales.any()):
            self._need("an input scale", name, scales, 0)
        if not self.each:
            return (scales.min() if self.checkpoint.reciprocal else scales.max()).reshape(1)
        own = scales[self.first_expert : self.first_expert + self.experts]
        if own.dim() == 1:
            return own.clone()
        return own.amin(-1) if self.checkpoint.reciprocal else own.amax(-1)

    def held(self, name: str, found: Tensor) -> Tensor:
        """Scales may each be one and have a product or a quotient that float32 does not hold."""
        self._need("what a kernel multiplies with", name, found, self.first_expert)
        return found

    def _multiplier(self, stored: Tensor) -> Tensor:
        return 1.0 / stored if self.checkpoint.reciprocal else stored.clone()

    def input(self, name: str, scales: Tensor) -> Tensor:
        """As a multiplier; 1 where it is computed at run time."""
        stored = self._combined(name, scales)
        return torch.where(stored == 0, 1.0, self._multiplier(stored))

    def quant(self, name: str, scales: Tensor) -> Tensor:
        stored = self._combined(name, scales)
        return torch.where(stored == 0, 0.0, stored if self.checkpoint.reciprocal else 1.0 / stored)

    def tied(self, s13: Tensor, why: str) -> Tensor:
        """The scale of gate and up, ``[E]``. Raises ScaleError where an expert has two."""
        both = self.weight(self.s13, s13)
        differing = (both[:, 0] != both[:, 1]).nonzero().flatten().tolist()
        if differing:
            raise ScaleError(
                f"gate and up of {len(differing)} experts have different weight global scales, and {why}",
                name=f"{self.runner}: {self.s13}, expert {self.first_expert + differing[0]}",
                expected="equal values",
                found=s13[differing[0]].tolist(),
                remedy="Use a runner whose gate and up may differ (reference, flashinfer_cutile), or export with unified scales.",
            )
        return both[:, 0].clone()

    def gate_with_input(self, inputs: Tensor, s13: Tensor) -> Tensor:
        return self.factor(self.gate(s13), inputs)

    def gate_apart(self, inputs: Tensor, s13: Tensor) -> Tensor:
        """For a kernel that multiplies the two itself."""
        self.gate_with_input(inputs, s13)
        return self.gate(s13)

    def up_with_inputs(self, inputs: Tensor, s13: Tensor, after: Tensor) -> Tensor:
        return self.held(self.s13, self.factor(self.up(s13), inputs) / self.input(self.a2, after))

    def after(self, after: Tensor) -> Tensor:
        inverse = self.quant(self.a2, after)
        return torch.where(inverse == 0, 1.0, inverse).expand(self.experts).clone()

    def down_with_input(self, inputs: Tensor, s2: Tensor) -> Tensor:
        return self.held(self.s2, self.input(self.a2, inputs) * self.down(s2))

    def factor(self, weight: Tensor, inputs: Tensor | None = None) -> Tensor:
        return weight if inputs is None else self.held(self.s13, self.input(self.a1, inputs) * weight)

    def gate(self, s13: Tensor) -> Tensor:
        if not self.gated:
            return self.weight(self.s13, s13)
        return self.weight(self.s13, s13)[:, 0].clone() if self.separate else self.tied(s13, "this runner has one factor")

    def up(self, s13: Tensor) -> Tensor:
        scales = self.weight(self.s13, s13)
        return scales[:, 1].clone() if self.gated else torch.ones_like(scales)

    def gate_up(self, s13: Tensor) -> Tensor:
        return self.weight(self.s13, s13)

    def down(self, s2: Tensor) -> Tensor:
        return self.weight(self.s2, s2)

    def weight(self, name: str, scales: Tensor) -> Tensor:
        if scales.numel() == 1:  # one for all experts
            scales = scales.reshape(1).expand(self.experts)
        if scales.dim() == 1 and self.gated and name == self.s13:  # one for gate and up
            scales = scales.unsqueeze(-1).expand(self.experts, 2)
        self._need("a weight global scale", name, scales, self.first_expert)
        return self._multiplier(scales)

    def _need(self, what: str, name: str, values: Tensor, first: int) -> None:
        wrong = ~are_scales(values)
        if bool(wrong.any()):
            expert = int(wrong.nonzero()[0, 0])
            raise ScaleError(
                f"{what} is not a scale",
                name=f"{name}, expert {first + expert}",
                expected=EXPECTED,
                found=values[expert].tolist(),
                remedy=_REMEDIES[what],
            )


_REMEDIES = {
    "a weight global scale": "For an expert of zeros store 1.0 here, and zeros as its block scales: it then gives zeros.",
    "an input scale": "An expert which met no token in calibration has none: calibrate with all experts, store another's, or "
    'choose what counts instead: missing_input_scale="max" (the largest of the layer) or "dynamic" (computed at run time).',
    "what a kernel multiplies with": "Export the checkpoint again: its input and weight scale, each fine, are together beyond "
    "any weight or activation.",
}
