"""Experts that change ranks (EPLB) move in kernel order: whole regions of kernel memory, with nothing gathered or scattered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aliasparam import AliasedStorage, AliasRegistry
from aliasparam.tensors.faces import _Aliased


class _Mover:
    """Who writes while experts move."""


def update(
    original: Any, updater: Any, routed_experts_weights_of_layer: dict[int, list[Tensor]], *args: Any, **kwargs: Any
) -> Any:
    """AROUND ``ExpertLocationUpdater.update`` (``sglang/srt/eplb/expert_location_updater.py``, 0.5.23).

    It sends and writes ``tensor[expert]`` of every tensor of a layer. All ranks have one layout, so bytes fit as they lie. A move
    that fails leaves layers that refuse.
    """
    mover, moved, involved = _Mover(), list[AliasedStorage](), list[AliasedStorage]()

    def in_kernel_order(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, _Aliased):
            return tensor
        storage = tensor._alias_storage
        involved.append(storage)
        name = storage.kernel_name
        if name is None or name.memory.shape[0] != tensor.shape[0]:
            return tensor
        storage.expose(mover, "SGLang's ExpertLocationUpdater")
        moved.append(storage)
        return name.memory.view(torch.uint8)

    layers = {layer: [in_kernel_order(t) for t in tensors] for layer, tensors in routed_experts_weights_of_layer.items()}
    answer = original(updater, layers, *args, **kwargs)
    for storage in moved:
        storage.accept()
    for listener in {id(one): one for storage in involved for one in storage.listeners}.values():
        if isinstance(listener, AliasRegistry):
            listener.process()
    return answer
