"""Kernels that need a GPU which is not here, computed from the very bytes by their index formulas (emulate.py).

For trying a kernel format through the whole engine on a CPU. Slow: a linear layer's values are read once for each load and kept
in bfloat16, which holds them exactly; an expert's are read whenever it is chosen.
"""

from __future__ import annotations

import logging
import weakref

import torch
from torch import Tensor, nn

from aliasparam import registry_of

from ...linear import emulate
from ...linear.backends import KernelNames, LinearBackend, LinearShape
from ...moe.runners import MoERunner
from ...quantize.codec import quantize_activation, scaled_codes
from ..emulated import emulated_runner

_CPU = torch.device("cpu")
_logger = logging.getLogger(__name__)


def emulated_linear(layer: nn.Module) -> None:
    """On a CPU the layer's backend, where it cannot run, becomes its emulator."""
    state = layer.__dict__
    backend: LinearBackend = state["nvfp4_backend"]
    if next(layer.parameters()).device == _CPU and backend.unavailable(_CPU) is not None:
        state["nvfp4_backend"] = EmulatedLinear(backend)
        _say(backend.name)


def emulated_moe(layer: nn.Module) -> None:
    """The same for experts."""
    state = layer.__dict__
    runner: MoERunner = state["nvfp4_runner"]
    if next(layer.parameters()).device == _CPU and runner.unavailable(_CPU) is not None:
        state["nvfp4_runner"] = emulated_runner(runner)
        _say(runner.name)


_said: set[str] = set()


def _say(name: str) -> None:
    if name not in _said:
        _said.add(name)
        _logger.warning("%s cannot run here: its bytes are served by an emulator, slowly", name)


class EmulatedLinear(LinearBackend):
    """``real``'s format, without its kernel."""

    def __init__(self, real: LinearBackend) -> None:
        self.real, self.name, self.layout, self.weight_only = real, real.name, real.layout, real.weight_only
        self.needs_input_scale = real.needs_input_scale
        self._values: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], Tensor]] = weakref.WeakKeyDictionary()

    def apply(self, layer: KernelNames, x: Tensor, shape: LinearShape) -> Tensor:
        if self.weight_only:
            rows, alpha = x.float(), layer.weight_alpha
        else:
            rows, alpha = scaled_codes(*quantize_activation(x, layer.input_scale_inv)), layer.alpha
        return (rows @ self._read(layer, shape).float().T * alpha).to(x.dtype)

    def _read(self, layer: KernelNames, shape: LinearShape) -> Tensor:
        assert isinstance(layer, nn.Module)
        registry = registry_of(layer)
        storages = [source.storage for source in registry.sources.values()] if registry is not None else []
        versions = tuple(storage.version for storage in storages if storage is not None)
        held = self._values.get(layer)
        if held is None or held[0] != versions:
            reader = emulate.READERS[self.layout.name]
            values = reader(layer.weight_prepared, layer.weight_scale_interleaved, shape.n, shape.k)
            held = self._values[layer] = versions, values.to(torch.bfloat16)
        return held[1]
