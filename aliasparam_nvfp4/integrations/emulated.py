"""Backends and runners whose kernel does not run on a CPU, computed there by their emulator.

So an engine on a CPU loads, reloads and answers from the very bytes that the kernel reads on its GPU. Slow: a linear layer's
values are read once for each load and kept in bfloat16, which holds them exactly; an expert's whenever it is chosen.
"""

from __future__ import annotations

import logging
import weakref
from functools import cache

import torch
from torch import Tensor, nn

from aliasparam import registry_of
from aliasparam.host import HOST

from ..linear import emulate
from ..linear.backends import KernelNames, LinearBackend, LinearShape
from ..moe import emulate as moe_emulate
from ..moe.runners import MoENames, MoERunner, MoEShape
from ..quantize.codec import quantize_activation, scaled_codes

_logger = logging.getLogger(__name__)


class EmulatedBackend(LinearBackend):
    """``backend``'s bytes, read by its kernel's index formula."""

    def __init__(self, backend: LinearBackend) -> None:
        self.real = backend
        self.name, self.layout, self.dtypes = backend.name, backend.layout, backend.dtypes
        self.weight_only, self.needs_input_scale = backend.weight_only, backend.needs_input_scale
        self._read: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], Tensor]] = weakref.WeakKeyDictionary()

    def lacks(self, device: torch.device) -> str | None:
        return None

    def check_shape(self, shape: LinearShape) -> None:
        self.real.check_shape(shape)

    def apply(self, layer: KernelNames, x: Tensor, shape: LinearShape) -> Tensor:
        if self.weight_only:
            rows, alpha = x.float(), layer.weight_alpha
        else:
            rows, alpha = scaled_codes(*quantize_activation(x, layer.input_scale_inv)).float(), layer.alpha
        return (rows @ self._values(layer, shape).float().T * alpha).to(x.dtype)

    def _values(self, layer: KernelNames, shape: LinearShape) -> Tensor:
        assert isinstance(layer, nn.Module)
        registry = registry_of(layer)
        versions = tuple(storage.version for storage in registry.storages()) if registry is not None else ()
        held = self._read.get(layer)
        if held is None or held[0] != versions:
            reader = emulate.READERS[self.layout.name]
            values = reader(layer.weight_prepared, layer.weight_scale_interleaved, shape.n, shape.k)
            held = self._read[layer] = versions, values.to(torch.bfloat16)
        return held[1]


class EmulatedRunner(MoERunner):
    """``runner``'s bytes, read by its kernel's index formula."""

    def __init__(self, runner: MoERunner) -> None:
        self.real = runner
        self.name, self.layout, self.dtypes = runner.name, runner.layout, runner.dtypes
        self.input_scales, self.separate_scales = runner.input_scales, runner.separate_scales
        self.activations, self.swiglu_numbers = runner.activations, runner.swiglu_numbers

    def lacks(self, device: torch.device) -> str | None:
        return None

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


def emulate_on_cpu(layer: nn.Module) -> None:
    """Have the emulator serve ``layer`` (of a method of this package) where it is on a CPU and its kernel does not run there."""
    state = layer.__dict__
    if next(layer.parameters()).device != HOST:
        return
    for kind, emulated in (("nvfp4_backend", emulated_backend), ("nvfp4_runner", emulated_runner)):
        real = state.get(kind)
        if real is not None and real.unavailable(HOST) is not None:
            state[kind] = emulated(real)
            _say(real.name)


@cache
def _say(name: str) -> None:
    _logger.warning("%s does not run on a CPU; its emulator serves its bytes, slowly", name)
