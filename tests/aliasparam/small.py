"""A small declared layer, the lines it is declared with, and their kernel order by an index formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from aliasparam import Alias, AliasedStorage, AliasRegistry, Derivation, Reencoding, TensorSpec, declare, registry_of
from aliasparam.testing import kernel_tensor, random_values

#: Halves of the rows change places.
SWAP = "(h r) k -> ~h r k, h=2"
#: Rows of the two halves alternate.
INTERLEAVE = "(h r) k -> r h k, h=2"
#: Tiles of 8 rows and 8 columns, ragged ends padded.
PAD8 = "(g r) (q c) -> g r q c, r=8 c=8"
PAD16 = "(g r) (q c) -> g r q c, r=16 c=8"
SWAP_PAD8 = f"{SWAP} | {PAD8}"
SWAP_PAD16 = f"{SWAP} | {PAD16}"


class Layer(nn.Module):
    """``weight`` with kernel name ``prepared``, and (with ``scale=True``) ``scale`` with the derivation ``alpha``."""

    weight: Any
    prepared: Tensor
    scale: Any
    alpha: Tensor

    def __init__(
        self,
        shape: tuple[int, ...] = (6, 8),
        layout: Any = SWAP,
        dtype: torch.dtype = torch.uint8,
        *,
        loaded: bool = True,
        scale: bool = False,
        device: Any = "cpu",
        **options: Any,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(counting(*shape).to(dtype).to(device), requires_grad=False)
        declarations: list[Any] = [Alias("weight", "prepared", layout, **options)]
        if scale:
            self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], device=device), requires_grad=False)
            declarations.append(Derivation("alpha", ("scale",), largest, (1,), torch.float32))
        declare(self, *declarations, loaded=loaded)

    def forward(self, x: Any = None) -> Tensor:
        return self.prepared.clone()


def kernel(line: str, tensor: Tensor) -> Tensor:
    """What a kernel reads of ``tensor``."""
    return kernel_tensor(line, tensor.detach().cpu().clone()).to(tensor.device)


def largest(scale: Tensor) -> Tensor:
    return scale.max().reshape(1)


def same_spec(spec: TensorSpec) -> TensorSpec:
    return spec


def halved(tensor: Tensor) -> Tensor:
    return tensor // 2


#: Values lose a bit; the source is kept.
HALVED = Reencoding(halved, same_spec)


def counting(*shape: int) -> Tensor:
    return (torch.arange(TensorSpec(shape, torch.uint8).numel) % 250).to(torch.uint8).view(shape)


def bytes_of(*shape: int, seed: int = 0) -> Tensor:
    return random_values(TensorSpec(shape, torch.uint8), torch.Generator().manual_seed(seed))


def layer_of(tensor: Tensor, layout: Any = SWAP, **kwargs: Any) -> Any:
    """A module without a forward: nn.Module's own raises NotImplementedError where the guard lets it through."""
    layer = nn.Module()
    layer.weight = nn.Parameter(tensor.clone(), requires_grad=False)
    declare(layer, Alias("weight", "prepared", layout), **kwargs)
    return layer


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
