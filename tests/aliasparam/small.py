"""A small declared layer, its storage, and transforms that fail when told to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from aliasparam import Alias, AliasedStorage, AliasRegistry, Derivation, SwapHalves, TensorSpec, Transform, declare, registry_of


class Layer(nn.Module):
    """``weight`` with kernel name ``prepared``, and (with ``scale=True``) ``scale`` with the derivation ``alpha``."""

    weight: Any
    prepared: Tensor
    scale: Any
    alpha: Tensor

    def __init__(
        self,
        shape: tuple[int, ...] = (6, 8),
        transform: Transform | None = None,
        dtype: torch.dtype = torch.uint8,
        *,
        loaded: bool = True,
        scale: bool = False,
        device: Any = "cpu",
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(counting(*shape).to(dtype).to(device), requires_grad=False)
        declarations: list[Any] = [Alias("weight", "prepared", transform or SwapHalves())]
        if scale:
            self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], device=device), requires_grad=False)
            declarations.append(Derivation("alpha", ("scale",), largest, (1,), torch.float32))
        declare(self, *declarations, loaded=loaded)

    def forward(self, x: Any = None) -> Tensor:
        return self.prepared.clone()


def largest(scale: Tensor) -> Tensor:
    return scale.max().reshape(1)


def counting(*shape: int) -> Tensor:
    return (torch.arange(TensorSpec(shape, torch.uint8).numel) % 250).to(torch.uint8).view(shape)


def the_registry(layer: nn.Module) -> AliasRegistry:
    registry = registry_of(layer)
    assert registry is not None
    return registry


def storage_of(layer: nn.Module, name: str = "weight") -> AliasedStorage:
    storage = the_registry(layer).sources[name].storage
    assert storage is not None
    return storage


def is_ready(layer: nn.Module) -> bool:
    return the_registry(layer).is_ready


@dataclass(frozen=True)
class Fails(SwapHalves):
    """SwapHalves whose n-th conversion raises while `failing` is open."""

    plan: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)

    def _count(self) -> None:
        if self.plan:
            self.plan["left"] -= 1
            if self.plan["left"] == 0:
                raise self.plan["error"]

    def forward(self, tensor: Tensor) -> Tensor:
        self._count()
        return super().forward(tensor)

    def inverse(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
        self._count()
        return super().inverse(tensor, spec)

    @contextmanager
    def failing(self, at: int, error: BaseException | None = None) -> Iterator[None]:
        """The ``at``-th conversion from now on raises ``error``."""
        self.plan.update(left=at, error=error or RuntimeError("out of memory"))
        try:
            yield
        finally:
            self.plan.clear()
