"""What every name must read as, computed from plain tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import AliasRegistry
from ._values import same_bytes


def expected_kernel_names(registry: AliasRegistry, checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every kernel name as the declarations define it, from plain checkpoint tensors."""
    known = dict(checkpoint)
    for source in registry.sources.values():
        if source.derived:
            known[source.derived] = source.plan.transform.forward(checkpoint[source.name].clone())
    for name, derived in registry.derived.items():
        declaration = derived.declaration
        known[name] = declaration.function(*(known[n].clone() for n in declaration.sources))
    return {name: value for name, value in known.items() if name not in checkpoint}


def flipped(tensor: Tensor) -> Tensor:
    """Rows in reverse order."""
    if tensor.element_size() > 1:
        return tensor.flip(0)
    return tensor.view(torch.uint8).flip(0).view(tensor.dtype)  # 8-bit floats have few operators


def need_same(found: Tensor, expected: Tensor, what: str) -> None:
    if not same_bytes(found, expected):
        raise AssertionError(f"{what}: expected {expected.tolist()}, found {found.tolist()}")
