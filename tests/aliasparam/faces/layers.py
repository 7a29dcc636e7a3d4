"""The layer under test, in each state, and its plain twin."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from aliasparam import Alias, AliasedStorage, SwapHalves, declare, process, registry_of

#: Functions compiled while their layer was ready.
COMPILED: WeakKeyDictionary[nn.Module, Callable[[Tensor], Tensor]] = WeakKeyDictionary()
VALUES = torch.arange(48, dtype=torch.uint8).view(6, 8)
STATES = ("checkpoint", "kernel", "half-written", "invalid")


class Plain(nn.Module):
    """The oracle: nothing is shared, the forward computes the kernel format from the weight each time."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(VALUES.to(device).clone(), requires_grad=False)

    def prepare(self) -> Tensor:
        return SwapHalves().forward(self.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.prepare().float()[0, 0]

    def scale_like_half(self) -> None:
        self.weight.data = self.weight.data.half()


class Declared(Plain):
    """The same with aliased memory; the forward reads the kernel name."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        declare(self, Alias("weight", "prepared", SwapHalves()))
        process(self)

    def prepare(self) -> Tensor:
        return self.get_buffer("prepared")


def storage_of(layer: nn.Module) -> AliasedStorage:
    registry = registry_of(layer)
    assert registry is not None and registry.sources["weight"].storage is not None
    return registry.sources["weight"].storage


def in_state(state: str, device: torch.device, *, compiled: bool = False) -> Declared:
    layer = Declared(device)
    if compiled:
        torch._dynamo.reset()
        COMPILED[layer] = torch.compile(layer, fullgraph=True, backend="eager")
        COMPILED[layer](torch.ones(1, device=device))
    if state == "checkpoint":
        layer.weight[0].copy_(VALUES[0])
    elif state != "kernel":
        storage_of(layer).invalidate()
        if state == "half-written":
            layer.weight[:2].copy_(VALUES[:2])
    return layer


def complete(layer: nn.Module) -> None:
    """Write what is still missing with the values the plain twin began with."""
    storage = storage_of(layer)
    if storage.state is not None and storage.state.value in ("empty", "invalid"):
        layer.weight.copy_(VALUES)
        return
    missing = ~storage._written.mask(48).view(6, 8)
    if storage.state is not None and storage.state.value == "partly written":
        for row, col in missing.nonzero().tolist():
            layer.weight[row, col] = VALUES[row, col]
