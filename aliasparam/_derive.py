"""Computing derivations: small tensors in memory of their own, from checkpoint values (and from each other)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ._planning import Derived
from ._transform import TensorSpec
from .errors import StateError

if TYPE_CHECKING:
    from ._registry import AliasRegistry


def refresh(registry: AliasRegistry, derived: Derived) -> int:
    """Compute one derivation again if it is not current; returns how many were computed. Its sources come first."""
    if registry.is_current(derived):
        return 0
    current = tuple(registry.generation_of(name) for name in derived.declaration.sources)
    spec = derived.declaration
    value = spec.function(*(_value(registry, name) for name in spec.sources))
    if derived.kernel is None or TensorSpec.of(value) != TensorSpec(spec.shape, spec.dtype):
        raise StateError(
            "a derivation returned another shape or dtype than it declared",
            module=registry.label,
            name=spec.name,
            expected=TensorSpec(spec.shape, spec.dtype),
            found=TensorSpec.of(value),
        )
    derived.kernel.memory.copy_(value)
    derived.kernel.accept()  # whatever other code wrote there is gone
    derived.seen = current
    derived.generation += 1
    return 1


def _value(registry: AliasRegistry, name: str) -> Tensor:
    if name in registry.derived:
        kernel = registry.derived[name].kernel
        if kernel is None:
            raise AssertionError(f"{registry.label}.{name}: derived before it has memory")
        return kernel.memory
    storage = registry.sources[name].storage
    if storage is None:
        raise AssertionError(f"{registry.label}.{name}: read before it has memory")
    return storage.read(storage.checkpoint)
