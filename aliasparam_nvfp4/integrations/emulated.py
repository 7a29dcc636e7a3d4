"""Backends and runners whose kernel does not run on a CPU, computed there by their emulator.

So an engine on a CPU loads, reloads and answers from the very bytes that the kernel reads on its GPU. Slow (every weight is
decoded at every forward, in float64): for tests and for looking.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from ..linear import emulate
from ..linear.backends import KernelNames, LinearBackend, LinearShape
from ..moe import emulate as moe_emulate
from ..moe.runners import MoENames, MoERunner, MoEShape


class EmulatedBackend(LinearBackend):
    """``backend``'s bytes, read by its kernel's index formula."""

    def __init__(self, backend: LinearBackend) -> None:
        self.real = backend
        self.name, self.layout, self.dtypes = backend.name, backend.layout, backend.dtypes
        self.weight_only, self.needs_input_scale = backend.weight_only, backend.needs_input_scale

    def check_shape(self, shape: LinearShape) -> None:
        self.real.check_shape(shape)

    def apply(self, layer: KernelNames, x: Tensor, shape: LinearShape) -> Tensor:
        alpha, inverse = (layer.weight_alpha, None) if self.weight_only else (layer.alpha, layer.input_scale_inv)
        names = layer.weight_prepared, layer.weight_scale_interleaved
        return emulate.linear(self.layout.name, x, *names, alpha, inverse, n=shape.n).to(x.dtype)


class EmulatedRunner(MoERunner):
    """``runner``'s bytes, read by its kernel's index formula."""

    def __init__(self, runner: MoERunner) -> None:
        self.real = runner
        self.name, self.layout, self.dtypes = runner.name, runner.layout, runner.dtypes
        self.input_scales, self.separate_scales = runner.input_scales, runner.separate_scales
        self.activations, self.swiglu_numbers = runner.activations, runner.swiglu_numbers

    def apply(self, layer: MoENames, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shape: MoEShape) -> Tensor:
        return moe_emulate.layer_output(layer, self.real, shape, x, topk_weights, topk_ids).to(x.dtype)

    def weights_changed(self) -> None:
        self.real.weights_changed()


@cache
def emulated_backend(backend: LinearBackend) -> EmulatedBackend:
    return EmulatedBackend(backend)


@cache
def emulated_runner(runner: MoERunner) -> EmulatedRunner:
    return EmulatedRunner(runner)


def emulate_on_cpu(layer: nn.Module) -> bool:
    """Have the emulator serve ``layer`` (made by a method of this package) where its kernel does not run on the CPU; whether it
    does."""
    state, cpu = layer.__dict__, torch.device("cpu")
    backend, runner = state.get("nvfp4_backend"), state.get("nvfp4_runner")
    if backend is not None and backend.unavailable(cpu) is not None:
        state["nvfp4_backend"] = emulated_backend(backend)
        return True
    if runner is not None and runner.unavailable(cpu) is not None:
        state["nvfp4_runner"] = emulated_runner(runner)
        return True
    return False
