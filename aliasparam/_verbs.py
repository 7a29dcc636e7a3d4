"""The verbs over a whole model: process, and the checkpoint state dict."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ._parameter import _Aliased
from ._reconcile import reconcile
from ._registry import registries


def process(module: nn.Module) -> int:
    """Bring every declared module under ``module`` (and itself) to kernel format.

    Idempotent and selective: only what was written since the last call is converted, in place. Call it where an engine calls
    ``process_weights_after_loading``, as often as you like.

    Returns:
        How many regions were converted and derivations computed; 0 when all was current.

    Raises:
        StateError: a declared tensor was not loaded whole.
        AdoptionError: a tensor that does not fit was put under a declared name.
    """
    return sum(registry.process() for _, registry in registries(module))


def restore(module: nn.Module) -> None:
    """Bring every declared storage under ``module`` back to checkpoint format, in place."""
    for _, registry in registries(module):
        registry.restore()


def invalidate(module: nn.Module) -> None:
    """Say that the memory of every declared name under ``module`` no longer holds weights (it was lent out, or slept).

    From then on reading, processing and the forward refuse, until each tensor is loaded whole again. Addresses stay.
    """
    for _, registry in registries(module):
        for source in registry.sources.values():
            if source.storage is not None:
                with source.storage.lock:
                    source.storage.invalidate()


def checkpoint_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The model's state dict in checkpoint format: bit-equal to what was loaded, whatever format the memory is in.

    Values are plain contiguous tensors. Those of declared names are copies, which stay what they are whatever is processed or
    loaded later; the others share memory with the model, as in ``module.state_dict()``. For a bounded footprint iterate over
    :func:`iterate_checkpoint` instead.
    """
    return dict(iterate_checkpoint(module))


def iterate_checkpoint(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, plain tensor) of every entry of the state dict, converted one at a time. Tied names come once."""
    for _, registry in registries(module):
        with torch.no_grad():
            reconcile(registry)
    for name, tensor in checkpoint_names(module).items():
        yield name, tensor._snapshot().contiguous() if isinstance(tensor, _Aliased) else tensor.detach()


def checkpoint_names(module: nn.Module) -> dict[str, Tensor]:
    """Live tensors of the state dict by name; of tied names the first, as checkpoints store them."""
    live: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            live[name] = tensor
    return live
