"""Computing derivations: small tensors in memory of their own, from checkpoint values (and from each other)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ._compute import compute
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
    value = compute(registry.label, derived, [value_of(registry, name) for name in spec.sources])
    if derived.kernel is None or TensorSpec.of(value) != TensorSpec(spec.shape, spec.dtype):
        raise StateError(
            "a derivation returned another shape or dtype than it declared",
            module=registry.label,
            name=spec.name,
            expected=TensorSpec(spec.shape, spec.dtype),
            found=TensorSpec.of(value),
            remedy="Return exactly that from the function, or declare what it returns.",
        )
    derived.kernel.memory.copy_(value)
    derived.kernel.accept()  # whatever other code wrote there is gone
    derived.seen = current
    derived.generation += 1
    return 1


def value_of(registry: AliasRegistry, name: str) -> Tensor:
    """What a source (in checkpoint format) or a derived name holds, also of a source that is shown as shards by other names."""
    if name in registry.derived:
        kernel = registry.derived[name].kernel
        if kernel is None:
            raise AssertionError(f"{registry.label}.{name}: derived before it has memory")
        return kernel.memory
    storage = registry.source_of(name).storage
    if storage is None:
        raise AssertionError(f"{registry.label}.{name}: read before it has memory")
    if name not in registry.sources and storage.kernel_name is not None:
        return storage.kernel_name.memory
    return storage.read(storage.checkpoint)


def late_derivations(registry: AliasRegistry) -> set[str]:
    """Derivations of kernel names, and what derives from them: computed after the conversion, the others before it."""
    late = {s.derived for s in registry.sources.values() if s.derived}
    for name, derived in registry.derived.items():  # in the order of refreshing
        if late.intersection(derived.declaration.sources):
            late.add(name)
    return {name for name in registry.derived if name in late}
