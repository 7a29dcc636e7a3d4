"""The verbs over a whole model: process, and the checkpoint state dict."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..tensors.faces import _Aliased
from .adopt import adopt
from .registry import registries


def process(module: nn.Module) -> int:
    """Let every declared module under ``module`` (and itself) run with what was loaded: compute what derives from it.

    Idempotent and selective: a module that nothing was written to costs one look. Call it where an engine calls
    ``process_weights_after_loading``, as often as you like.

    Returns:
        How many sources were new and derivations computed; 0 when all was current.

    Raises:
        StateError: a declared tensor was not loaded whole.
        AdoptionError: a tensor that does not fit was put under a declared name.
    """
    return sum([registry.process() for _, registry in registries(module)])


def invalidate(module: nn.Module) -> None:
    """Say that the memory of every declared name under ``module`` no longer holds weights (it was lent out, or slept).

    From then on reading, processing and the forward refuse, until each tensor is loaded whole again. Addresses stay.
    """
    for _, registry in registries(module):
        for storage in registry.storages():
            storage.invalidate("invalidate() was called")


def accept_kernel_bytes(module: nn.Module) -> None:
    """Say that every kernel name under ``module`` holds whole weights, in kernel order, that other code put there.

    For engines that save kernel names themselves and copy them back (sleep and wake), or fill them from a peer in the same
    order. Checkpoint names read them, derivations follow at the next :func:`process`.
    """
    for _, registry in registries(module):
        for storage in registry.storages():
            storage.accept()


def checkpoint_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The model's state dict in checkpoint format: bit-equal to what was loaded, at any time.

    Values are plain contiguous tensors. Those of declared names are copies, which stay what they are whatever is loaded later;
    the others share memory with the model, as in ``module.state_dict()``. For a bounded footprint iterate over
    :func:`iterate_checkpoint` instead.
    """
    return dict(iterate_checkpoint(module))


def iterate_checkpoint(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, plain tensor) of every entry of the state dict, gathered one at a time. Tied names come once."""
    for _, registry in registries(module):
        with torch.no_grad():
            adopt(registry)
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
