"""Computing derivations: small tensors in memory of their own, from checkpoint values (and from each other)."""

from __future__ import annotations

from torch import Tensor

from ..errors import DerivationError, StateError, foreign_code, located
from ..spec import TensorSpec, no_values
from .declarations import Derivation
from .names import ModuleNames


def refresh(registry: ModuleNames, name: str) -> int:
    """Compute one derivation again if it is not current; returns how many were computed. Its sources come first."""
    if registry.is_current(name):
        return 0
    derived = registry.derived[name]
    versions = registry.versions_of(derived)
    with located(name=name):
        value = _compute(registry, derived.declaration)
    derived.put(value, versions)
    return 1


def value_of(registry: ModuleNames, name: str) -> Tensor:
    """What a source or a kernel name holds, also of a source that is shown as shards by other names."""
    if (kernel := registry.kernel(name)) is not None:
        return kernel.memory
    storage = registry.sources[name].need_storage("read")
    return storage.gather(storage.bound.whole)


def _compute(registry: ModuleNames, declared: Derivation) -> Tensor:
    """The derived value, from copies that the function may change.

    Raises:
        DerivationError: the function raised something of its own, or returned no tensor with values.
        StateError: it returned one of another shape or dtype than it declared.
    """
    held = [(name, value_of(registry, name)) for name in declared.sources]
    values = [value if name in registry.sources else value.clone() for name, value in held]  # which it may overwrite
    given = ", ".join(f"{n} {TensorSpec.of(v)}" for n, v in zip(declared.sources, values, strict=True))
    remedy = "Load other values, or mend the function of this derivation; until then the module refuses to run."
    facts = {"expected": "sources that can be derived from", "found": given, "remedy": remedy}
    with foreign_code("the function of this derivation failed", DerivationError, **facts):
        value = declared.function(*values)
    kind = no_values(value)
    if kind is not None or TensorSpec.of(value) != declared.spec:
        raise (StateError if kind is None else DerivationError)(
            "the function of this derivation returned something else than it declared",
            expected=declared.spec,
            found=kind or TensorSpec.of(value),
            remedy="Return exactly that from the function, or declare what it returns.",
        )
    return value
