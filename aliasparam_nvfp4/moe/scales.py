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

from .activation import SWIGLU, ExpertActivation
from .global_scales import GlobalScales


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
        stored: the checkpoint's scales, as multipliers.
        inputs: how activations meet their scales.
        expert_activation: what lies between the two GEMMs.
        numbers: how the kernel takes the numbers of that activation; None: not at all.
    """

    stored: GlobalScales
    inputs: InputScales
    expert_activation: ExpertActivation = SWIGLU
    numbers: SwigluNumbers | None = SwigluNumbers.AS_FLOATS

    def derivations(self) -> list[Derivation]:
        """Refreshed by ``process`` whenever a source was written."""
        return [*self._factors(), *self._numbers()]

    def _factors(self) -> list[Derivation]:
        at, f32 = self.stored, torch.float32
        each, s13, s2, a1, a2 = (at.experts,), at.s13, at.s2, at.a1, at.a2
        if self.inputs is InputScales.NONE:
            both = [Derivation("g1_alphas_gate_up", (s13,), at.gate_up, (at.experts, 2), f32)]
            return [
                Derivation("g1_alphas", (s13,), at.gate, each, f32),
                Derivation("g1_scale_c", (s13,), at.up, each, f32),
                *(both if at.gated else []),
                Derivation("g2_alphas", (s2,), at.down, each, f32),
            ]
        if self.inputs is InputScales.DIVIDING:
            return [
                Derivation("g1_alphas", (a1, s13), at.gate_apart, each, f32),
                Derivation("g2_alphas", (a2, s2), at.down_with_input, each, f32),
                Derivation("w13_input_scale_max", (a1,), partial(at.input, a1), (1,), f32),
                Derivation("w2_input_scale_max", (a2,), partial(at.input, a2), (1,), f32),
            ]
        quants = each if self.inputs is InputScales.EACH else (1,)
        up = (a1, s13, a2) if at.gated else (a2,)
        return [
            Derivation("w13_input_scale_quant", (a1,), partial(at.quant, a1), quants, f32),
            Derivation("w2_input_scale_quant", (a2,), partial(at.quant, a2), quants, f32),
            Derivation("g1_alphas", (a1, s13), at.gate_with_input, each, f32),
            Derivation("g1_scale_c", up, at.up_with_inputs if at.gated else at.after, each, f32),
            Derivation("g2_alphas", (a2, s2), at.down_with_input, each, f32),
        ]

    def _numbers(self) -> list[Derivation]:
        numbers, s13 = self.expert_activation, self.stored.s13
        each, f32 = (self.stored.experts,), torch.float32
        if not numbers.has_numbers or self.numbers in (None, SwigluNumbers.AS_FLOATS):
            return []
        sources: tuple[str, ...] = (s13,)
        beta: Callable[..., Tensor] = partial(self._same, numbers.beta)
        limit: Callable[..., Tensor] = partial(self._same, numbers.limit or 0.0)
        if self.numbers is SwigluNumbers.OF_RAW_SUMS:
            sources = (s13,) if self.inputs is InputScales.NONE else (s13, self.stored.a1)
            beta, limit = self._raw_beta, self._raw_limit
        found = [
            Derivation("gemm1_alpha", (s13,), partial(self._same, numbers.alpha), each, f32),
            Derivation("gemm1_beta", sources, beta, each, f32),
        ]
        return found if numbers.limit is None else [*found, Derivation("gemm1_clamp_limit", sources, limit, each, f32)]

    def _same(self, value: float, s13: Tensor) -> Tensor:
        return s13.new_full((self.stored.experts,), value)

    def _raw_beta(self, s13: Tensor, *inputs: Tensor) -> Tensor:
        at, beta = self.stored, self.expert_activation.beta
        found = beta / at.factor(at.up(s13), *inputs)
        return at.held(at.s13, found) if beta > 0 else found

    def _raw_limit(self, s13: Tensor, *inputs: Tensor) -> Tensor:
        at, limit = self.stored, self.expert_activation.limit or 0.0
        return at.held(at.s13, limit / at.factor(at.tied(s13, _ONE_LIMIT), *inputs))


_ONE_LIMIT = "this runner has one clamp limit for both"
