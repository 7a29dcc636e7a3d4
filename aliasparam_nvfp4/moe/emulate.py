"""Emulators of MoE kernels: bytes read one by one by each kernel's index formula, independent of the layouts, and the
scalars used where its documentation says. Slow, float64, for any device; for the tests and ``aliasparam-nvfp4 verify --moe``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linear.emulate import grid, read, shuffled
from ..quantize.codec import quantize_activation, scaled_codes
from ..quantize.missing import RunTimeScales
from .activation import ExpertActivation
from .runners import MoENames, MoEShape
from .runners._base import MoERunner
from .scales import InputScales, SwigluNumbers

#: Kernel row of a logical row: (0 for gate and w2, 1 for up; row within the half; rows of a padded half).
Place = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Scalars:
    """What a kernel multiplies with, for one expert.

    Attributes:
        input: reciprocal of the scale by which x is quantized, or None where it is not.
        gate: factor of the first GEMM's gate sums.
        up: factor of its up sums.
        hidden: as ``input``, for what the activation gives.
        down: factor of the second GEMM's sums.
        after: without a gate, factor of what the activation gives; None is 1.
        raw: (alpha, beta, limit or None) of a kernel which holds and shifts its sums before it multiplies them.
        before: whether biases are added before the factors.
    """

    input: Tensor | None
    gate: Tensor
    up: Tensor
    hidden: Tensor | None
    down: Tensor
    after: Tensor | None = None
    raw: tuple[Tensor, Tensor, Tensor | None] | None = None
    before: bool = False


def layer_output(
    layer: MoENames, runner: MoERunner, shape: MoEShape, x: Tensor, topk_weights: Tensor, topk_ids: Tensor
) -> Tensor:
    """float64 ``[T, H]``: what the runner's kernel computes from the kernel names, but for its roundings of sums.

    Args:
        layer: kernel names.
        runner: whose layout and scalars they are.
        shape: logical dims.
        x: ``[T, H]``.
        topk_weights: ``[T, k]``.
        topk_ids: ``[T, k]`` global expert numbers.
    """
    scalars = SCALARS[runner.input_scales, runner.separate_scales, runner.swiglu_numbers is SwigluNumbers.OF_RAW_SUMS]
    run_time = layer.run_time_scales
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for expert in range(shape.experts):
        token, choice = (topk_ids == shape.first_expert + expert).nonzero(as_tuple=True)
        if not token.numel():
            continue
        w13, w2 = weights(layer, runner, shape, expert)
        by = scalars(layer, expert)
        bias13, bias2 = biases(layer, runner, shape, expert)
        hidden = _activated(_quantized(x, by.input, run_time)[token] @ w13.T, by, shape.expert_activation, bias13)
        rows = _scaled(_quantized(hidden, by.hidden, run_time) @ w2.T, by.down, bias2, before=by.before)
        out.index_add_(0, token, rows * topk_weights[token, choice].double().unsqueeze(-1))
    return out


def weights(layer: MoENames, runner: MoERunner, shape: MoEShape, expert: int) -> tuple[Tensor, Tensor]:
    """(w13 ``[2I, H]``, or ``[I, H]`` without a gate; w2 ``[H, I]``) of one expert: code times block scale, float64, without
    global scales."""
    hidden, intermediate = shape.padded(runner.layout)
    w13_place, w2_place, swizzled = PLACES[runner.layout.of(shape.expert_activation).name]
    i, h = shape.intermediate, shape.hidden
    row, column = grid(shape.w13_rows, h, layer.w13_weight_prepared.device)
    place = w13_place(row // i, row % i, intermediate)
    w13 = read(layer.w13_weight_prepared[expert], layer.w13_blockscale_swizzled[expert], place, column, swizzled=swizzled)
    row, column = grid(h, i, layer.w13_weight_prepared.device)
    place = w2_place(torch.zeros_like(row), row, hidden)
    w2 = read(layer.w2_weight_prepared[expert], layer.w2_blockscale_swizzled[expert], place, column, swizzled=swizzled)
    return w13, w2


def biases(layer: MoENames, runner: MoERunner, shape: MoEShape, expert: int) -> tuple[Tensor | float, Tensor | float]:
    """(``[2I]``, or ``[I]`` without a gate; ``[H]``) of one expert in logical order, float64; 0.0 where nothing is added. One of
    the ranks that divide I adds the second."""
    suffix = "_raw" if runner.biases is not None and runner.biases.raw else ""
    if not hasattr(layer, f"gemm1_bias{suffix}"):
        return 0.0, 0.0
    first, second = (getattr(layer, f"gemm{n}_bias{suffix}")[expert].double() for n in (1, 2))
    row, h = torch.arange(shape.w13_rows, device=first.device), torch.arange(shape.hidden, device=first.device)
    places = BIASES.get(runner.layout.of(shape.expert_activation).name, (_gate_up, _gate_up))
    rows = len(first) // (2 if shape.expert_activation.gated else 1)
    first = first[places[0](row // shape.intermediate, row % shape.intermediate, rows)]
    return first, second[places[1](torch.zeros_like(h), h, len(second))] if shape.tp_rank == 0 else 0.0


def _gate_up(half: Tensor, row: Tensor, rows: int) -> Tensor:
    return half * rows + row


def _up_gate(half: Tensor, row: Tensor, rows: int) -> Tensor:
    return (1 - half) * rows + row


def _blocks(half: Tensor, row: Tensor, rows: int) -> Tensor:
    return 128 * (row // 64) + 64 * (1 - half) + row % 64


def _shuffled_rows(half: Tensor, row: Tensor, rows: int) -> Tensor:
    return shuffled(row)


def _shuffled_pairs(half: Tensor, row: Tensor, rows: int) -> Tensor:
    return _shuffled_rows(half, 2 * row + (1 - half), rows)


#: Layout name to (place of w13 rows, place of w2 rows, whether scales are swizzled).
PLACES: dict[str, tuple[Place, Place, bool]] = {
    "checkpoint": (_gate_up, _gate_up, False),
    "row-major": (_gate_up, _gate_up, False),
    "gate-up": (_gate_up, _gate_up, True),
    "up-gate": (_up_gate, _gate_up, True),
    "up-gate-256": (_up_gate, _gate_up, True),
    "interleaved": (_blocks, _gate_up, True),
    "shuffled": (_shuffled_pairs, _shuffled_rows, True),
    # Without a gate; every row is of half 0.
    "rows": (_gate_up, _gate_up, False),
    "rows-swizzled": (_gate_up, _gate_up, True),
    "rows-shuffled": (_shuffled_rows, _shuffled_rows, True),
}
#: Layout name to places of biases; others have them gate above up, whatever the order of their weights.
BIASES: dict[str, tuple[Place, Place]] = {name: PLACES[name][:2] for name in ("up-gate", "shuffled", "rows-shuffled")}


def _quantized(x: Tensor, reciprocal: Tensor | None, run_time: RunTimeScales | None) -> Tensor:
    """Values of codes and block scales, without the global scale; x as it is where there is none.

    A scale of 0 is computed here, for all rows or for each, and multiplied in.
    """
    if reciprocal is None:
        return x.double()
    if run_time is None or bool(reciprocal != 0):
        return scaled_codes(*quantize_activation(x, reciprocal)).double()
    groups = [x] if run_time.whole else [x[i : i + 1] for i in range(len(x))]
    inverses = [(2688.0 / group.float().abs().max().clamp(min=1e-30)).reshape(1) for group in groups]
    found = [scaled_codes(*quantize_activation(g, inv)).double() / inv for g, inv in zip(groups, inverses, strict=True)]
    return torch.cat(found)


def _scaled(sums: Tensor, factor: Tensor, bias: Tensor | float, *, before: bool) -> Tensor:
    return (sums + bias) * factor.double() if before else sums * factor.double() + bias


def _activated(sums: Tensor, by: Scalars, activation: ExpertActivation, bias: Tensor | float) -> Tensor:
    if not activation.gated:
        hidden = activation(_scaled(sums, by.gate, bias, before=by.before), None)
        return hidden if by.after is None else hidden * by.after.double()
    gate, up = sums.chunk(2, -1)
    more, more_up = (bias, bias) if isinstance(bias, float) else bias.chunk(2)
    if by.raw is None:
        return activation(_scaled(gate, by.gate, more, before=by.before), _scaled(up, by.up, more_up, before=by.before))
    alpha, beta, limit = by.raw
    gate, up = gate + more, up + more_up
    if limit is not None:
        gate, up = torch.minimum(gate, limit), torch.clamp(up, -limit, limit)
    true = gate * by.gate.double()
    return true * torch.sigmoid(alpha * true) * (up + beta) * by.up.double()


def _one_factor(layer: MoENames, e: int) -> Scalars:
    """CUTLASS ``quant_scales``, CuteDSL v2: one factor for gate and up, the activation's own scale after it."""
    both = layer.g1_alphas[e]
    return Scalars(layer.w13_input_scale_quant, both, both, layer.w2_input_scale_quant, layer.g2_alphas[e])


def _two_factors(layer: MoENames, e: int) -> Scalars:
    """TRT-LLM ``output1_scale_gate_scalar`` and ``output1_scale_scalar``: the latter has the activation's scale in it."""
    one, up = torch.ones_like(layer.w13_input_scale_quant), layer.g1_scale_c[e]
    limit: Tensor | None = getattr(layer, "gemm1_clamp_limit", None)
    raw = None
    if hasattr(layer, "gemm1_alpha"):
        raw = layer.gemm1_alpha[e].double(), layer.gemm1_beta[e].double(), None if limit is None else limit[e].double()
    return Scalars(layer.w13_input_scale_quant, layer.g1_alphas[e], up, one, layer.g2_alphas[e], up, raw, before=True)


def _reference(layer: MoENames, e: int) -> Scalars:
    """A factor each, the activation's own scale after it."""
    stored = layer.w2_input_scale_quant
    up = layer.g1_scale_c[e] / torch.where(stored == 0, 1.0, stored)
    return Scalars(layer.w13_input_scale_quant, layer.g1_alphas[e], up, layer.w2_input_scale_quant, layer.g2_alphas[e])


def _each(layer: MoENames, e: int) -> Scalars:
    """CuteDSL v1: every expert its own scales."""
    both = layer.g1_alphas[e]
    return Scalars(layer.w13_input_scale_quant[e], both, both, layer.w2_input_scale_quant[e], layer.g2_alphas[e])


def _weights_alone(layer: MoENames, e: int) -> Scalars:
    """cuTile ``w1_global_scale`` ``[E, 2]``, ``w2_global_scale``: activations as they are."""
    both: Tensor | None = getattr(layer, "g1_alphas_gate_up", None)
    gate, up = (layer.g1_alphas[e], layer.g1_alphas[e]) if both is None else both[e]
    return Scalars(None, gate, up, None, layer.g2_alphas[e])


def _divided(layer: MoENames, e: int) -> Scalars:
    """b12x ``input_global_scale`` and ``fc2_input_scale`` divide; the kernel multiplies the first back (``moe_dispatch.py``)."""
    both = layer.g1_alphas[e] * layer.w13_input_scale_max
    return Scalars(1 / layer.w13_input_scale_max, both, both, 1 / layer.w2_input_scale_max, layer.g2_alphas[e])


#: (how activations meet their scales, whether gate and up have a factor each, whether numbers are of raw sums) to their use.
SCALARS: dict[tuple[InputScales, bool, bool], Callable[[MoENames, int], Scalars]] = {
    (InputScales.ONE, False, False): _one_factor,
    (InputScales.ONE, True, True): _two_factors,
    (InputScales.ONE, True, False): _reference,
    (InputScales.EACH, False, False): _each,
    (InputScales.NONE, True, False): _weights_alone,
    (InputScales.DIVIDING, False, False): _divided,
}
