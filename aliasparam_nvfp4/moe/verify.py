"""Acceptance of an MoE runner on the machine that has its GPU: its kernel against its emulator, across a reload."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from aliasparam import reload

from ..errors import BackendError
from ..linear.verify import Verdict, signal_to_noise
from ..quantize.codec import quantize
from .activation import RELU2, ExpertActivation
from .emulate import layer_output
from .method import NvFp4MoEMethod
from .routing import Routing
from .runners import MoENames, MoERunner, moe_runner

#: (what, E, H, I): aligned; SmolLM2's experts, ragged in H; ragged in I.
SHAPES = (("8 x 512 x 256", 8, 512, 256), ("8 x 576 x 192", 8, 576, 192), ("4 x 256 x 80", 4, 256, 80))
TOKENS = (1, 7, 130)
#: Run besides plain SwiGLU where the runner has it, with numbers that many values meet.
ACTIVATIONS = {"relu2": RELU2, "clamped": ExpertActivation(alpha=1.702, beta=1.0, limit=1.0)}
#: Kernels round activations by approximate reciprocals, so single codes differ; a wrong layout gives about 0 dB.
LEAST_DB = 20.0


def verify(runner: str, device: torch.device) -> Iterator[Verdict]:
    """Run the runner on every shape, load other weights into the same memory, and run it again.

    Raises:
        BackendError: unknown, or it cannot run on ``device``.
    """
    chosen = moe_runner(runner, device)
    if (reason := chosen.unavailable(device)) is not None:
        raise BackendError("this runner cannot run here", name=chosen.name, found=reason, remedy="Run this on its GPU.")
    for what, e, h, i in SHAPES:
        method, layer = NvFp4MoEMethod(chosen.name), nn.Module()
        with torch.device(device):
            method.create_weights(layer, e, h, i, torch.bfloat16)
        names, shape = cast(MoENames, layer), layer.__dict__["nvfp4_moe_shape"]
        addresses: set[tuple[str, int]] = set()
        for seed in (1, 2):
            tensors = {name: tensor.to(device) for name, tensor in random_experts(e, h, i, seed, chosen.separate_scales).items()}
            with reload(layer) as session:
                session.load(tensors)
            addresses |= {(n, t.data_ptr()) for n, t in layer.named_buffers()}
            for tokens in TOKENS:
                x, weights, ids = (t.to(device) for t in _choices(tokens, e, h))
                expected = layer_output(names, chosen, shape, x, weights, ids)
                decibel = signal_to_noise(method.apply(layer, x, weights, ids).double(), expected)
                yield Verdict(what if seed == 1 else f"{what}, reloaded", tokens, decibel, decibel >= LEAST_DB)
        for routing in _routings(e, device):
            x, logits = (t.to(device) for t in _routed(e, h))
            expected = layer_output(names, chosen, shape, x, *routing.choose(logits))
            decibel = signal_to_noise(method.apply_logits(layer, x, logits, routing).double(), expected)
            yield Verdict(f"{what}, {routing.kind}", x.shape[0], decibel, decibel >= LEAST_DB)
        for kind, activation in ACTIVATIONS.items():
            if chosen.refusal(activation) is None:
                yield from _with_activation(chosen, device, f"{what}, {kind}", (e, h, i), activation)
        moved = len(addresses) != len(list(layer.named_buffers()))
        yield Verdict(f"{what}, addresses", 0, math.inf, not moved, "moved" if moved else "as they were")


def _with_activation(
    chosen: MoERunner, device: torch.device, what: str, dims: tuple[int, int, int], activation: ExpertActivation
) -> Iterator[Verdict]:
    method, layer = NvFp4MoEMethod(chosen.name, activation=activation), nn.Module()
    with torch.device(device):
        method.create_weights(layer, *dims, torch.bfloat16)
    names, shape = cast(MoENames, layer), layer.__dict__["nvfp4_moe_shape"]
    for seed in (1, 2):
        with reload(layer) as session:
            session.load({n: t.to(device) for n, t in random_experts(*dims, seed, gated=activation.gated).items()})
        x, weights, ids = (t.to(device) for t in _choices(TOKENS[-1], *dims[:2]))
        expected = layer_output(names, chosen, shape, x, weights, ids)
        decibel = signal_to_noise(method.apply(layer, x, weights, ids).double(), expected)
        yield Verdict(what if seed == 1 else f"{what}, reloaded", TOKENS[-1], decibel, decibel >= LEAST_DB)


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


def _choices(tokens: int, e: int, h: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, h, generator=random).to(torch.bfloat16)
    weights, ids = torch.randn(tokens, e, generator=random).softmax(-1).topk(2)
    return x, weights, ids.int()


def _routed(e: int, h: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    return torch.randn(7, h, generator=random).to(torch.bfloat16), torch.randn(7, e, generator=random)


def _routings(e: int, device: torch.device) -> tuple[Routing, ...]:
    """One of each kind, as models have them."""
    bias = torch.linspace(-0.2, 0.2, e, device=device)
    return (
        Routing("softmax_topk", 2),
        Routing("softmax_topk_renormalized", 2),
        Routing("sigmoid_topk", 1),
        Routing("sigmoid_bias_grouped", 2, bias=bias, groups=2, top_groups=2, scaling=2.5),
    )
