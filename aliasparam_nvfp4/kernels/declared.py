"""A layer is given its weights once."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from aliasparam import registry_of
from aliasparam.errors import StateError


def need_undeclared(layer: nn.Module, names: Iterable[str]) -> None:
    """Raise StateError where ``layer`` has declared any of ``names``: others in their place would lose what it serves."""
    registry = registry_of(layer)
    held = [name for name in names if registry is not None and name in registry.sources]
    if held:
        raise StateError(
            "this layer has its weights already",
            module=type(layer).__name__,
            name=held[0],
            remedy="Write new values to the names that it has, or create the weights on a new module.",
        )
