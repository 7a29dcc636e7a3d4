"""What serves a model that an engine has loaded, and which of its buffers are this package's. Engines only log plugins that fail,
and serve by their own classes then."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from aliasparam.module.registry import registries


def serving(model: nn.Module) -> dict[str, int]:
    """How many layers each backend or runner of this package serves; empty where the engine's own classes do."""
    return dict(Counter(registry.about.partition(":")[0] for _, registry in registries(model)))


def said_of(model: nn.Module) -> str | None:
    """The same as a line, or None."""
    layers = ", ".join(f"{count} layers by {name}" for name, count in sorted(serving(model).items()))
    return f"aliasparam_nvfp4 serves {layers}" if layers else None


def without_kernel_names(model: nn.Module, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The pairs, but for the model's buffers that hold weights in kernel order or derive from them: no other code saves or writes
    them."""
    ours = {f"{path}.{name}".lstrip(".") for path, registry in registries(model) for name in registry.kernel_names()}
    return ((name, tensor) for name, tensor in named if name not in ours)
