"""EPLB moves experts between ranks as they lie in memory, in kernel order; factors derived from their scales follow.

Seams: ``RoutedExperts.get_expert_weights`` of vllm/model_executor/layers/fused_moe/routed_experts.py, and ``move_from_buffer`` of
vllm/distributed/eplb/rebalance_execute.py, through which all that moves is written; tried on 0.32.0.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.eplb import rebalance_execute
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from aliasparam import AliasRegistry, accept_kernel_bytes, process, registry_of

from .patching import replace

#: Layers that gave their memory out, by the address of their first tensor.
_layers: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


def balance_in_kernel_order() -> None:
    replace(RoutedExperts, "get_expert_weights", _weights)
    replace(rebalance_execute, "move_from_buffer", _moving)


def kernel_rows(registry: AliasRegistry, experts: int) -> list[Tensor]:
    """The memory of every declared tensor whose regions are the experts of this rank: u8 ``[E, bytes]`` in kernel order. Input
    scales are of all experts, and one for all: they stay."""
    rows = []
    for name, source in registry.sources.items():
        storage = source.storage
        if storage is None or "input" in name:
            continue
        bound = storage.bound
        if storage.spec.shape[0] != experts:
            raise AssertionError(f"{storage.label}: not of {experts} experts")
        elements = storage.elements[: bound.regions * bound.region_capacity]
        rows.append(elements.view(torch.uint8).view(experts, -1))
    return rows


def _weights(original: Any) -> Any:
    def get_expert_weights(self: Any) -> Any:
        registry = registry_of(self)
        if registry is None:
            return original(self)
        rows = kernel_rows(registry, self.local_num_experts)
        _layers[rows[0].data_ptr()] = self
        return rows

    return get_expert_weights


def _moving(original: Any) -> Any:
    def move_from_buffer(expert_weights: Sequence[Tensor], *args: Any, **kwargs: Any) -> None:
        original(expert_weights, *args, **kwargs)
        layer = _layers.get(expert_weights[0].data_ptr())
        if layer is not None:
            accept_kernel_bytes(layer)
            process(layer)

    return move_from_buffer
