"""The layers under test, in each state, and their plain twins.

- *linear*: u8 ``[6, 8]``, one region, a kernel format of the same size.
- *experts*: u8 ``[4, 2, 3]``, four regions of six bytes, so that wider elements reach over two of them.
- *padded*: bf16 ``[3, 4, 5]``, three regions with room for a kernel format of ``[8, 8]`` each, so the name is strided.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aliasparam import Alias, AliasedStorage, State, declare, process, registry_of
from aliasparam.testing import kernel_tensor

from ..small import SWAP, SWAP_PAD8

STATES = ("ready", "open", "half-written", "invalid")


@dataclass(frozen=True)
class Kind:
    shape: tuple[int, ...]
    dtype: torch.dtype
    line: str

    @property
    def values(self) -> Tensor:
        count = torch.Size(self.shape).numel()
        return torch.arange(count).to(self.dtype).view(self.shape)


KINDS = {
    "linear": Kind((6, 8), torch.uint8, SWAP),
    "experts": Kind((4, 2, 3), torch.uint8, SWAP),
    "padded": Kind((3, 4, 5), torch.bfloat16, SWAP_PAD8),
}


class Plain(nn.Module):
    """The oracle: nothing is shared, the forward computes the kernel format from the weight each time."""

    def __init__(self, device: torch.device, kind: str = "linear") -> None:
        super().__init__()
        self.kind = KINDS[kind]
        self.weight = nn.Parameter(self.kind.values.to(device), requires_grad=False)
        numbers = torch.arange(1, self.weight.numel() + 1).view(self.kind.shape)
        self.places = kernel_tensor(self.kind.line, numbers).to(device)  # 0 is padding

    def prepare(self) -> Tensor:
        padded = torch.cat([self.weight.data.new_zeros(1), self.weight.data.flatten()])
        return padded[self.places]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.prepare().float().sum() + self.prepare().float().reshape(-1)[0]


class Declared(Plain):
    """The same with aliased memory; the forward reads the kernel name."""

    def __init__(self, device: torch.device, kind: str = "linear") -> None:
        super().__init__(device, kind)
        declare(self, Alias("weight", "prepared", self.kind.line))
        process(self)

    def prepare(self) -> Tensor:
        return self.get_buffer("prepared")


def storage_of(layer: nn.Module) -> AliasedStorage:
    registry = registry_of(layer)
    assert registry is not None and registry.sources["weight"].storage is not None
    return registry.sources["weight"].storage


def come_to(layer: Declared, state: str) -> None:
    """Bring a ready layer into a state; of experts, the first is written, or the first and half of the second."""
    values, half = layer.kind.values, layer.kind.shape[-2] // 3 or 1
    if state == "open":
        layer.weight[0].copy_(values[0])
    elif state != "ready":
        storage_of(layer).invalidate()
        if state == "half-written":
            written = (slice(half),) if values.dim() == 2 else (1, slice(half))
            layer.weight[written].copy_(values[written])
            if values.dim() > 2:
                layer.weight[0].copy_(values[0])


def complete(layer: Declared) -> None:
    """Write what is still missing with the values the plain twin began with."""
    states, values = storage_of(layer).states, layer.kind.values
    for region, state in enumerate(states.each):
        wanted, inside = (
            (values[region], layer.weight[region]) if values.dim() > 2 else (values, layer.weight.view_as(layer.weight))
        )
        if state is not State.LOADED:
            for box in states.missing_boxes(region):
                within = tuple(slice(*ends) for ends in box[-2:])
                inside[within] = wanted[within]
