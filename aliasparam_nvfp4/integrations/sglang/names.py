"""Which buffers of a model are this library's: kernel names and what derives from weights."""

from __future__ import annotations

from torch import nn

from aliasparam.module.registry_of import registries


def kernel_names(model: nn.Module) -> set[str]:
    """Dotted names; other code neither saves nor writes them."""
    found = set()
    for path, registry in registries(model):
        own = {source.derived for source in registry.sources.values()} | set(registry.derived)
        found |= {f"{path}.{name}" if path else name for name in own if name is not None}
    return found
