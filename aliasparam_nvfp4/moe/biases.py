"""How kernels take the biases of experts, ``w13_bias`` ``[E, 2I]`` (``[E, I]`` without a gate) and ``w2_bias`` ``[E, H]``.

Most add them to true values: ``gemm1_bias`` and ``gemm2_bias`` are the same memory, in the order of the kernel's rows. TRT-LLM
adds them to its raw sums, in float32 and shuffled as the rows of weights (FlashInfer
``tests/moe/trtllm_gen_fused_moe_utils.py``, ``prepare_static_weights_for_kernel``), so it has names of its own beside them. With
``a`` and ``s`` as in scales.py, f32, as many rows as the weights have, padding included:

| name | value |
|---|---|
| ``gemm1_bias_raw`` | ``w13_bias / (a1 * s13[e])``, gate and up each with its own |
| ``gemm2_bias_raw`` | ``w2_bias / (a2 * s2[e])`` |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aliasparam import Derivation, Layout

from ..errors import ScaleError
from ..layouts import lines
from .global_scales import GlobalScales
from .stored import Stored


@dataclass(frozen=True)
class Biases:
    """Attributes:
    gated: order of ``w13_bias`` ``[gate; up]``.
    ungated: its order without a gate.
    w2: order of ``w2_bias``.
    raw: whether the kernel adds them to raw sums.
    """

    gated: Layout
    ungated: Layout
    w2: Layout
    raw: bool = False

    def formats(self, stored: Stored, *, gated: bool) -> dict[str, tuple[str, Layout]]:
        """Checkpoint name to (kernel name, its order), for a checkpoint in the form ``stored``."""
        own, w2 = (_PLAIN, _PLAIN) if self.raw else (self._own(gated), self.w2)
        return {"w13_bias": ("gemm1_bias", stored.bias_order(own, halves=gated)), "w2_bias": ("gemm2_bias", w2)}

    def derivations(self, scales: GlobalScales, stored: Stored, rows: int, hidden: int) -> list[Derivation]:
        """The names of kernels that add to raw sums; ``rows`` and ``hidden`` are those of the checkpoint's w13 and w2."""
        if not self.raw:
            return []
        gated, e = scales.gated, scales.experts
        first = RawBias(scales, self._own(gated), stored.bias_order(_PLAIN, halves=gated))
        second = RawBias(scales, self.w2, _PLAIN)
        dims = first.order.kernel_shape((e, rows)), second.order.kernel_shape((e, hidden))
        return [
            Derivation("gemm1_bias_raw", ("w13_bias", scales.s13, scales.a1), first.of_w13, dims[0], torch.float32),
            Derivation("gemm2_bias_raw", ("w2_bias", scales.a2, scales.s2), second.of_w2, dims[1], torch.float32),
        ]

    def _own(self, gated: bool) -> Layout:
        return self.gated if gated else self.ungated


@dataclass(frozen=True)
class RawBias:
    """One of them, as a function of checkpoint values.

    Attributes:
        scales: whose factors the kernel multiplies its sums with.
        order: of the kernel's rows, from ``[gate; up]`` ones.
        stored: from the checkpoint's order to ``[gate; up]``.
    """

    scales: GlobalScales
    order: Layout
    stored: Layout

    def of_w13(self, bias: Tensor, s13: Tensor, inputs: Tensor) -> Tensor:
        return self._over(self.scales.factor(self.scales.weight(self.scales.s13, s13), inputs), bias, "w13_bias")

    def of_w2(self, bias: Tensor, inputs: Tensor, s2: Tensor) -> Tensor:
        return self._over(self.scales.down_with_input(inputs, s2), bias, "w2_bias")

    def _over(self, factors: Tensor, bias: Tensor, name: str) -> Tensor:
        """Raises ScaleError where float32 does not hold the quotient of a finite bias."""
        rows = self.stored.bind(tuple(bias.shape), torch.float32).encode(bias.float())
        raw = (rows.view(len(rows), factors[0].numel(), -1) / factors.view(len(rows), -1, 1)).view_as(rows)
        if bool((raw.isinf() & rows.isfinite()).any()):
            raise ScaleError(
                "a bias over its input and weight scale has no value in float32",
                name=name,
                expected="scales that its kernel can divide biases by",
                found=factors.tolist(),
                remedy="Use a runner that adds biases to true values: reference, triton, flashinfer_cutlass.",
            )
        return self.order.bind(tuple(rows.shape), torch.float32).encode(raw)


_PLAIN = Layout.identity(1)

#: As the checkpoint has them, gate above up.
PLAIN = Biases(_PLAIN, _PLAIN, _PLAIN)
#: ``[up; gate]``, padded as the weights of ``UP_GATE_SWIZZLED``: CUTLASS.
UP_GATE = Biases(lines.up_gate_rows(64), lines.pad_rows(128), lines.pad_rows(64))
#: As the weights of ``SHUFFLED``: TRT-LLM.
SHUFFLED_RAW = Biases(lines.up_gate_shuffled_rows(), lines.shuffle_rows(128), lines.shuffle_rows(128), raw=True)
