"""Acceptance of an MoE runner on the machine that has its GPU: its kernel against its emulator, across a reload."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from ..kernels.acceptance import Answer, Verdict, across_a_reload, judged, need_its_gpu
from ..quantize.codec import quantize
from .activation import RELU2, SWIGLU, ExpertActivation
from .emulate import layer_output
from .method import NvFp4MoEMethod
from .routing import Routing
from .runners import MoENames, MoERunner, moe_runner

Dims = tuple[int, int, int]
#: (what, E, H, I): aligned; SmolLM2's experts, ragged in H; ragged in I.
SHAPES = (("8 x 512 x 256", 8, 512, 256), ("8 x 576 x 192", 8, 576, 192), ("4 x 256 x 80", 4, 256, 80))
TOKENS = (1, 7, 130)
_CLAMPED = ExpertActivation(alpha=1.702, beta=1.0, limit=1.0)
#: Run besides plain SwiGLU where the runner has it, with numbers that many values meet; and whether with biases.
KINDS = {
    "relu2": (RELU2, False),
    "clamped": (_CLAMPED, False),
    "relu2, biases": (RELU2, True),
    "clamped, biases": (_CLAMPED, True),
}
#: Kernels round activations by approximate reciprocals, so single codes differ; a wrong layout gives about 0 dB.
LEAST_DB = 20.0


def verify(runner: str, device: torch.device) -> Iterator[Verdict]:
    """Run the runner on every shape, load other weights into the same memory, and run it again.

    Raises:
        BackendError: unknown, or it cannot run on ``device``.
    """
    chosen = moe_runner(runner, device)
    need_its_gpu(chosen, device)
    for what, *sizes in SHAPES:
        dims = (sizes[0], sizes[1], sizes[2])
        method, layer = _layer(chosen, device, dims, SWIGLU)
        weights = partial(_weights, dims, device, chosen.separate_scales)
        yield from across_a_reload(layer, what, weights, partial(_answers, method, layer, TOKENS), LEAST_DB)
        for routing in _routings(dims[0], device):
            yield from judged(f"{what}, {routing.kind}", [_routed(method, layer, routing)], LEAST_DB)
        for kind, (activation, bias) in KINDS.items():
            if chosen.refusal(activation, bias=bias) is None:
                method, layer = _layer(chosen, device, dims, activation, bias)
                weights = partial(_weights, dims, device, False, gated=activation.gated, bias=bias)
                answers = partial(_answers, method, layer, TOKENS[-1:])
                yield from across_a_reload(layer, f"{what}, {kind}", weights, answers, LEAST_DB)


def _layer(
    chosen: MoERunner, device: torch.device, dims: Dims, activation: ExpertActivation, bias: bool = False
) -> tuple[NvFp4MoEMethod, nn.Module]:
    method, layer = NvFp4MoEMethod(chosen.name, activation=activation, bias=bias), nn.Module()
    with torch.device(device):
        method.create_weights(layer, *dims, torch.bfloat16)
    return method, layer


def _weights(
    dims: Dims, device: torch.device, separate: bool, seed: int, *, gated: bool = True, bias: bool = False
) -> dict[str, Tensor]:
    tensors = random_experts(*dims, seed, separate, gated)
    if bias:
        random = torch.Generator().manual_seed(seed)
        rows = {"w13_bias": tensors["w13_weight"].shape[1], "w2_bias": dims[1]}
        tensors |= {name: torch.randn(dims[0], count, generator=random).bfloat16() for name, count in rows.items()}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _answers(method: NvFp4MoEMethod, layer: nn.Module, batches: Sequence[int], _: dict[str, Tensor]) -> Iterator[Answer]:
    for tokens in batches:
        x, weights, ids = _choices(tokens, layer)
        yield tokens, method.apply(layer, x, weights, ids), _emulated(layer, x, weights, ids)


def _routed(method: NvFp4MoEMethod, layer: nn.Module, routing: Routing) -> Answer:
    shape, random = layer.__dict__["nvfp4_moe_shape"], torch.Generator().manual_seed(0)
    device = layer.get_buffer("g1_alphas").device
    x = torch.randn(7, shape.hidden, generator=random).to(device, torch.bfloat16)
    logits = torch.randn(7, shape.experts, generator=random).to(device)
    return 7, method.apply_logits(layer, x, logits, routing), _emulated(layer, x, *routing.choose(logits))


def _emulated(layer: nn.Module, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    state = layer.__dict__
    return layer_output(cast(MoENames, layer), state["nvfp4_runner"], state["nvfp4_moe_shape"], x, weights, ids)


def random_experts(e: int, h: int, i: int, seed: int, separate: bool = False, gated: bool = True) -> dict[str, Tensor]:
    """Checkpoint tensors of a layer, as ModelOpt would make them from normal weights that keep outputs at about 1.

    Input scales differ among experts; with ``separate``, the scales of gate and up do.
    """
    halves = 2 if gated else 1
    random = torch.Generator().manual_seed(seed)
    each = torch.linspace(0.8, 1.0, e)
    tensors = {"w13_input_scale": (each * 4.5 / 2688).unsqueeze(1).repeat(1, halves), "w2_input_scale": each * 9.0 / 2688}
    for name, dims in (("w13", (e, halves * i, h)), ("w2", (e, h, i))):
        packed, scale, total = quantize(torch.randn(dims, generator=random) / dims[2] ** 0.5)
        per_expert = (e, 2) if name == "w13" and gated else (e,)
        tensors |= {f"{name}_weight": packed, f"{name}_weight_scale": scale, f"{name}_weight_scale_2": total.expand(per_expert)}
    if separate:
        tensors["w13_weight_scale_2"] = tensors["w13_weight_scale_2"] * torch.tensor([1.0, 1.25])
    return tensors


def _choices(tokens: int, layer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    shape, random = layer.__dict__["nvfp4_moe_shape"], torch.Generator().manual_seed(tokens)
    device = layer.get_buffer("g1_alphas").device
    x = torch.randn(tokens, shape.hidden, generator=random).to(device, torch.bfloat16)
    weights, ids = torch.randn(tokens, shape.experts, generator=random).softmax(-1).topk(2)
    return x, weights.to(device), ids.int().to(device)


def _routings(e: int, device: torch.device) -> tuple[Routing, ...]:
    """One of each kind, as models have them."""
    bias = torch.linspace(-0.2, 0.2, e, device=device)
    return (
        Routing("softmax_topk", 2),
        Routing("softmax_topk_renormalized", 2),
        Routing("sigmoid_topk", 1),
        Routing("sigmoid_bias_grouped", 2, bias=bias, groups=2, top_groups=2, scaling=2.5),
    )
