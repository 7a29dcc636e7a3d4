"""EPLB moves experts between ranks as they lie in memory, in kernel order; factors derived from their scales follow."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aliasparam import AliasRegistry, accept_kernel_bytes, process, registry_of

#: Layers that gave their memory out, by the address of their first tensor.
_layers: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


def kernel_rows(registry: AliasRegistry, experts: int) -> list[Tensor]:
    """The memory of every declared tensor whose regions are the experts of this rank: u8 ``[E, bytes]`` in kernel order. Input
    scales are of all experts, and one for all: they stay."""
    rows = []
    for name, source in registry.sources.items():
        storage = source.storage
        if storage is None or "input" in name:
            continue
        if storage.spec.shape[0] != experts:
            raise AssertionError(f"{storage.label}: not of {experts} experts")
        rows.append(storage.elements[: storage.bound.capacity].view(torch.uint8).view(experts, -1))
    return rows


def get_expert_weights(original: Any, layer: Any) -> Any:
    """AROUND ``RoutedExperts.get_expert_weights`` (vllm/model_executor/layers/fused_moe/routed_experts.py, 0.32.0)."""
    registry = registry_of(layer)
    if registry is None:
        return original(layer)
    rows = kernel_rows(registry, layer.local_num_experts)
    _layers[rows[0].data_ptr()] = layer
    return rows


def move_from_buffer(original: Any, expert_weights: Sequence[Tensor], *args: Any, **kwargs: Any) -> None:
    """AROUND ``move_from_buffer`` (vllm/distributed/eplb/rebalance_execute.py, 0.32.0), by which all that moves is written."""
    original(expert_weights, *args, **kwargs)
    layer = _layers.get(expert_weights[0].data_ptr())
    if layer is not None:
        accept_kernel_bytes(layer)
        process(layer)
