"""Layers that are tied to another's tensor: a head to the embedding, a plain linear layer to another.

vLLM gives both the same parameter before it loads. What it then makes of the second alone, as the packed copy that a CPU computes
with, its reload leaves as it was (vllm/model_executor/model_loader/reload/, 0.32.0), and so does whoever writes the first.
:func:`follow` processes the second again from the tensor that it is tied to; where that was packed itself, and is gone, it
computes with the packed copy of the first.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from aliasparam import registry_of

#: By layer: the tensor's name in it, and the layer whose it is.
_tied: weakref.WeakKeyDictionary[nn.Module, tuple[str, weakref.ref[nn.Module]]] = weakref.WeakKeyDictionary()


def record(original: Any, model: nn.Module) -> None:
    """AROUND ``record_metadata_for_reloading``, which vLLM calls when the model was made."""
    original(model)
    first: dict[int, nn.Module] = {}
    for layer in model.modules():
        for name, parameter in layer._parameters.items():
            owner = first.setdefault(id(parameter), layer)
            if parameter is not None and owner is not layer and registry_of(layer) is None:
                _tied[layer] = name, weakref.ref(owner)


def tied(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(layer, its tensor's name, the layer whose tensor that is)."""
    for layer in model.modules():
        name, owner = _tied.get(layer, ("", None))
        found = owner() if owner is not None else None
        if found is not None:
            yield layer, name, found


@torch.no_grad()
def follow(model: nn.Module) -> None:
    """Process what is tied from what the others hold now. Addresses stay."""
    for layer, name, owner in tied(model):
        if not owner.get_parameter(name).numel():
            layer.cpu_linear = owner.cpu_linear
            continue
        before: Any = dict(layer._parameters)
        layer.register_parameter(name, owner._parameters[name])
        layer.quant_method.process_weights_after_loading(layer)  # type: ignore[union-attr, operator]
        for own, old in before.items():
            new = layer._parameters[own]
            if new is not None and new is not old:
                old.copy_(new)
                layer.register_parameter(own, old)
