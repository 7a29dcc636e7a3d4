"""Finding the registries of a model."""

from __future__ import annotations

from torch import nn

from .registry import AliasRegistry

ATTRIBUTE = "_alias_registry"


def registry_of(module: nn.Module) -> AliasRegistry | None:
    """The registry of exactly this module, or None."""
    registry: AliasRegistry | None = module.__dict__.get(ATTRIBUTE)
    return registry


def registries(model: nn.Module) -> list[tuple[str, AliasRegistry]]:
    """(module path, registry) of every declared module in ``model``; labels are refreshed to the paths."""
    found = []
    for path, module in model.named_modules():
        registry: AliasRegistry | None = module.__dict__.get(ATTRIBUTE)
        if registry is not None:
            if path and path != registry.label:
                registry.relabel(path)
            found.append((path, registry))
    return found
