"""One declared weight, its storage, and bytes for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from aliasparam import (
    Alias,
    TensorSpec,
    Transform,
    declare,
    registry_of,
)
from aliasparam.testing import random_values


def layer_of(tensor: Tensor, transform: Transform, **kwargs: Any) -> Any:
    layer = nn.Module()
    layer.weight = nn.Parameter(tensor.clone(), requires_grad=False)
    declare(layer, Alias("weight", "prepared", transform), **kwargs)
    return layer


def storage_of(layer: nn.Module, name: str = "weight") -> Any:
    registry = registry_of(layer)
    assert registry is not None
    return registry.sources[name].storage


def bytes_of(*shape: int, seed: int = 0) -> Tensor:
    return random_values(TensorSpec(shape, torch.uint8), torch.Generator().manual_seed(seed))
