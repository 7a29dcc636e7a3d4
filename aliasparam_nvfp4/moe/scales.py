"""The scalars of MoE kernels, as derivations.

With ``a1 = max(w13_input_scale)`` and ``a2 = max(w2_input_scale)`` over *all* experts of all ranks (so that ranks agree),
``s13[e] = w13_weight_scale_2[e]`` (column 0 gate, 1 up) and ``s2[e] = w2_weight_scale_2[e]``:

| kind | g1_alphas | g1_scale_c | g2_alphas | w13_input_scale_quant | w2_input_scale_quant |
|---|---|---|---|---|---|
| one | ``a1 * s13[e, 0]`` | ``a1 * s13[e, 1] / a2`` | ``a2 * s2[e]`` | ``1 / a1`` | ``1 / a2`` |
| each | ``a1[e] * s13[e, 0]`` | ``a1[e] * s13[e, 1] / a2[e]`` | ``a2[e] * s2[e]`` | ``1 / a1[e]`` | ``1 / a2[e]`` |
| none | ``s13[e, 0]`` | ``s13[e, 1]`` | ``s2[e]`` | none | none |
| dividing | ``s13[e, 0]`` | none | ``a2 * s2[e]`` | none | none |

``each`` takes each expert's own input scales. All are f32 ``[E]``, except the quants of the first row, ``[1]``.
``none`` has ``g1_alphas_gate_up`` too: both columns of ``s13``, ``[E, 2]``, for kernels that take them as one tensor.
``dividing`` is for kernels that divide by an input scale and multiply it back into the first GEMM's factor themselves: it has
``w13_input_scale_max = a1`` and ``w2_input_scale_max = a2``, ``[1]``.
A runner with one factor for gate and up cannot serve an expert whose two weight scales differ; it refuses it by name.

Without a gate ``s13`` is ``[E]``, ``g1_alphas`` takes it as it is, there is no ``g1_alphas_gate_up``, and ``g1_scale_c`` has no
weight scale in it: ``1 / a2``, ``1 / a2[e]``, ``1`` (SGLang 0.5.23 ``moe_runner/flashinfer_trtllm.py``, ``_compute_g1_scale_c``).

compressed-tensors stores the reciprocals of all these scales. Every ``s`` and ``a`` above is then 1 over the stored value, so
``1 / a1`` is the *smallest* stored input scale, exactly.

The numbers of a SwiGLU (activation.py) that has any, for kernels which read them from memory, f32 ``[E]``:

| the kernel takes them | gemm1_alpha | gemm1_beta | gemm1_clamp_limit |
|---|---|---|---|
| of true values | ``alpha`` | ``beta`` | ``limit`` |
| of raw sums | ``alpha`` | ``beta / (a1 * s13[e, 1])`` | ``limit / (a1 * s13[e, 0])`` |
| python floats | none | none | none |

``of raw sums`` is TRT-LLM: it clamps both sums and adds beta to that of up before it multiplies them with their factors, while
alpha meets the gate's true value (SGLang 0.5.23 ``modelopt_quant.py``,
``ModelOptNvFp4FusedMoEMethod.process_weights_after_loading``: ``1.0 / g1_alphas_up`` for beta 1, ``limit / g1_alphas``;
FlashInfer ``trtllm_fused_moe_dev_kernel.cu``, ``gatedSilu``, has the order). One limit for both sums is right where gate and up
have the same factor. Any other expert is refused by name: SGLang multiplies the block scales of one half with the ratio, in
place, which rounds them anew at every load. Without a limit ``gemm1_clamp_limit`` does not exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial

import torch
from torch import Tensor

from aliasparam import Derivation

from ..checkpoint.format import MODELOPT, CheckpointFormat
from ..errors import ScaleError
from ..quantize.global_scale import EXPECTED, are_scales
from ..quantize.missing import Missing as Missing
from ..quantize.missing import completed, is_dynamic
from .activation import SWIGLU, ExpertActivation


class InputScales(Enum):
    """How a kernel's activations meet the input scales of the checkpoint."""

    ONE = "one scale for all experts"
    EACH = "a scale for each expert"
    DIVIDING = "one scale for all experts, which the kernel divides by"
    NONE = "activations as they are (W4A16)"


class SwigluNumbers(Enum):
    """How a kernel takes alpha, beta and limit of a SwiGLU."""

    OF_TRUE_VALUES = "of true values"
    OF_RAW_SUMS = "of raw sums"
    AS_FLOATS = "python floats"


@dataclass(frozen=True)
class MoEScales:
    """The derivations of one runner on one rank.

    Attributes:
        inputs: how activations meet their scales.
        runner: for messages.
        separate: whether gate and up of an expert may have different weight scales.
        first_expert: global number of this rank's first expert.
        experts: experts of this rank.
        checkpoint: names, and the direction of the scales.
        expert_activation: what lies between the two GEMMs.
        numbers: how the kernel takes the numbers of that activation; None: not at all.
        missing: what counts for an expert without an input scale (0, or no number), see missing.py: "max" is what ModelOpt's
            exporter does for experts that met no token. Where it is "dynamic" and one of the layer's is missing, a kernel
            computes all of them: its quant is 0, and the factors have weight scales alone.
    """

    inputs: InputScales
    runner: str
    separate: bool
    first_expert: int
    experts: int
    checkpoint: CheckpointFormat = MODELOPT
    expert_activation: ExpertActivation = SWIGLU
    numbers: SwigluNumbers | None = SwigluNumbers.AS_FLOATS
    missing: Missing = "refuse"

    def derivations(self) -> list[Derivation]:
        """Refreshed by ``process`` whenever a source was written."""
        return [*self._factors(), *self._numbers()]

    def _factors(self) -> list[Derivation]:
        each, f32, s13, s2, a1, a2 = (self.experts,), torch.float32, self.s13, self.s2, self.a1, self.a2
        if self.inputs is InputScales.NONE:
            both = [Derivation("g1_alphas_gate_up", (s13,), self._gate_up, (self.experts, 2), f32)]
            return [
                Derivation("g1_alphas", (s13,), self._gate, each, f32),
                Derivation("g1_scale_c", (s13,), self._up, each, f32),
                *(both if self._gated else []),
                Derivation("g2_alphas", (s2,), self._down, each, f32),
            ]
        if self.inputs is InputScales.DIVIDING:
            return [
                Derivation("g1_alphas", (a1, s13), self._gate_apart, each, f32),
                Derivation("g2_alphas", (a2, s2), self.down_with_input, each, f32),
                Derivation("w13_input_scale_max", (a1,), partial(self._input, a1), (1,), f32),
                Derivation("w2_input_scale_max", (a2,), partial(self._input, a2), (1,), f32),
            ]
        quants = each if self.inputs is InputScales.EACH else (1,)
        up = (a1, s13, a2) if self._gated else (a2,)
        return [
            Derivation("w13_input_scale_quant", (a1,), partial(self._quant, a1), quants, f32),
            Derivation("w2_input_scale_quant", (a2,), partial(self._quant, a2), quants, f32),
            Derivation("g1_alphas", (a1, s13), self._gate_with_input, each, f32),
            Derivation("g1_scale_c", up, self._up_with_inputs if self._gated else self._after, each, f32),
            Derivation("g2_alphas", (a2, s2), self.down_with_input, each, f32),
        ]

    def _numbers(self) -> list[Derivation]:
        numbers, s13 = self.expert_activation, self.s13
        each, f32 = (self.experts,), torch.float32
        if not numbers.has_numbers or self.numbers in (None, SwigluNumbers.AS_FLOATS):
            return []
        sources: tuple[str, ...] = (s13,)
        beta: Callable[..., Tensor] = partial(self._same, numbers.beta)
        limit: Callable[..., Tensor] = partial(self._same, numbers.limit or 0.0)
        if self.numbers is SwigluNumbers.OF_RAW_SUMS:
            sources = (s13,) if self.inputs is InputScales.NONE else (s13, self.a1)
            beta, limit = self._raw_beta, self._raw_limit
        found = [
            Derivation("gemm1_alpha", (s13,), partial(self._same, numbers.alpha), each, f32),
            Derivation("gemm1_beta", sources, beta, each, f32),
        ]
        return found if numbers.limit is None else [*found, Derivation("gemm1_clamp_limit", sources, limit, each, f32)]

    # -- names ---------------------------------------------------------------------------------------------------------

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

    @property
    def _gated(self) -> bool:
        return self.expert_activation.gated

    # -- values --------------------------------------------------------------------------------------------------------

    def _combined(self, name: str, scales: Tensor) -> Tensor:
        """Input scales ``[E_global]`` or ``[E_global, 1 or 2]`` as ``[1]``, or ``[E]`` of this rank's experts, as stored."""
        if scales.numel() == 1:  # one for all experts
            scales = scales.reshape(1).expand(self.first_expert + self.experts)
        scales = completed(scales, self.missing, reciprocal=self.checkpoint.reciprocal)
        if not is_dynamic(self.missing) or bool(scales.any()):
            self._need("an input scale", name, scales, 0)
        if self.inputs is not InputScales.EACH:
            return self._largest(scales).reshape(1)
        own = scales[self.first_expert : self.first_expert + self.experts]
        if own.dim() == 1:
            return own.clone()
        return own.amin(-1) if self.checkpoint.reciprocal else own.amax(-1)

    def _largest(self, scales: Tensor) -> Tensor:
        return scales.min() if self.checkpoint.reciprocal else scales.max()

    def _held(self, name: str, found: Tensor) -> Tensor:
        """Scales may each be one and have a product or a quotient that float32 does not hold."""
        self._need("what a kernel multiplies with", name, found, self.first_expert)
        return found

    def _multiplier(self, stored: Tensor) -> Tensor:
        return 1.0 / stored if self.checkpoint.reciprocal else stored.clone()

    def _input(self, name: str, scales: Tensor) -> Tensor:
        """As a multiplier; 1 where it is computed at run time."""
        stored = self._combined(name, scales)
        return torch.where(stored == 0, 1.0, self._multiplier(stored))

    def _quant(self, name: str, scales: Tensor) -> Tensor:
        stored = self._combined(name, scales)
        return torch.where(stored == 0, 0.0, stored if self.checkpoint.reciprocal else 1.0 / stored)

    def _same(self, value: float, s13: Tensor) -> Tensor:
        return s13.new_full((self.experts,), value)

    def _raw_beta(self, s13: Tensor, *inputs: Tensor) -> Tensor:
        found = self.expert_activation.beta / self.factor(self._up(s13), *inputs)
        return self._held(self.s13, found) if self.expert_activation.beta > 0 else found

    def _raw_limit(self, s13: Tensor, *inputs: Tensor) -> Tensor:
        return self._held(self.s13, (self.expert_activation.limit or 0.0) / self.factor(self._tied(s13, _ONE_LIMIT), *inputs))

    def _gate_with_input(self, inputs: Tensor, s13: Tensor) -> Tensor:
        return self.factor(self._gate(s13), inputs)

    def _gate_apart(self, inputs: Tensor, s13: Tensor) -> Tensor:
        """For a kernel that multiplies the two itself."""
        self._gate_with_input(inputs, s13)
        return self._gate(s13)

    def _up_with_inputs(self, inputs: Tensor, s13: Tensor, after: Tensor) -> Tensor:
        return self._held(self.s13, self.factor(self._up(s13), inputs) / self._input(self.a2, after))

    def _after(self, after: Tensor) -> Tensor:
        inverse = self._quant(self.a2, after)
        return torch.where(inverse == 0, 1.0, inverse).expand(self.experts).clone()

    def down_with_input(self, inputs: Tensor, s2: Tensor) -> Tensor:
        return self._held(self.s2, self._input(self.a2, inputs) * self._down(s2))

    def factor(self, weight: Tensor, inputs: Tensor | None = None) -> Tensor:
        return weight if inputs is None else self._held(self.s13, self._input(self.a1, inputs) * weight)

    def _gate(self, s13: Tensor) -> Tensor:
        if not self._gated:
            return self.weight(self.s13, s13)
        return self.weight(self.s13, s13)[:, 0].clone() if self.separate else self._tied(s13, "this runner has one factor")

    def _up(self, s13: Tensor) -> Tensor:
        scales = self.weight(self.s13, s13)
        return scales[:, 1].clone() if self._gated else torch.ones_like(scales)

    def _tied(self, s13: Tensor, why: str) -> Tensor:
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

    def _gate_up(self, s13: Tensor) -> Tensor:
        return self.weight(self.s13, s13)

    def _down(self, s2: Tensor) -> Tensor:
        return self.weight(self.s2, s2)

    def weight(self, name: str, scales: Tensor) -> Tensor:
        if scales.numel() == 1:  # one for all experts
            scales = scales.reshape(1).expand(self.experts)
        if scales.dim() == 1 and self._gated and name == self.s13:  # one for gate and up
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


_ONE_LIMIT = "this runner has one clamp limit for both"

_REMEDIES = {
    "a weight global scale": "For an expert of zeros store 1.0 here, and zeros as its block scales: it then gives zeros.",
    "an input scale": "An expert which met no token in calibration has none: calibrate with all experts, store another's, or "
    'choose what counts instead: missing_input_scale="max" (the largest of the layer) or "dynamic" (computed at run time).',
    "what a kernel multiplies with": "Export the checkpoint again: its input and weight scale, each fine, are together beyond "
    "any weight or activation.",
}
