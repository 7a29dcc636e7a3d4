"""The verbs: `declare`, where weights are created; those over a whole model; and the hook of a declared module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DeclarationError
from ..tensors.call import count_collective_writes
from ..tensors.dispatch import traced_by_jit
from ..tensors.faces import _Aliased
from ..torch_private import import_what_dispatch_imports, is_traced_by_jit, stand_ins
from .adopt import adopt
from .declarations import Declaration
from .names import READY
from .registry import ATTRIBUTE, AliasRegistry, Hook, registries, registry_of


def declare(
    module: nn.Module,
    *declarations: Declaration,
    loaded: bool = True,
    aliasing: bool = True,
    checks: Sequence[Hook] = (),
    on_processed: Sequence[Hook] = (),
) -> AliasRegistry:
    """Declare checkpoint names, kernel names and derivations of a module.

    Parameters named as sources become :class:`AliasedParameter`; kernel names become non-persistent buffers. On the meta
    device only the plan is made: memory is bound when :func:`process` finds a tensor under the name, and that tensor counts
    as loaded (also the uninitialized memory that ``Module.to_empty()`` makes: load it before processing).

    A declared Parameter gets no gradients: one with ``requires_grad=True`` is a UserWarning.

    Args:
        module, declarations: the owner of the Parameters; :class:`Alias`, :class:`Derivation`, :class:`Keep`.
        loaded: whether the Parameters already hold checkpoint values; False for freshly allocated ones.
        aliasing: False gives every kernel name memory of its own (results must be the same; for tests and comparison).
        checks, on_processed: added to the registry's in the same step: no interrupt leaves the names without them.

    Returns:
        The module's registry.

    Raises:
        DeclarationError: a field of another kind, an unknown source, a name declared twice, a cycle, or a repack function that is
            no layout. The module is unchanged then.
        LayoutError: the layout does not exist for this shape or dtype.
    """
    if not isinstance(module, nn.Module):
        raise DeclarationError("declarations are of a module", expected="an nn.Module", found=type(module).__name__)
    if stand_ins() is not None:
        raise DeclarationError(
            "declared among stand-ins for tensors, which have no memory",
            module=type(module).__name__,
            expected="real tensors, or a module on the meta device",
            found="an active FakeTensorMode",
            remedy='Declare outside of the mode, or under torch.device("meta") instead.',
        )
    known = registry_of(module)
    registry = known or AliasRegistry(module)
    plan = registry.planned(declarations, aliasing=aliasing)
    if known is None:
        import_what_dispatch_imports()
        count_collective_writes()
        _hook(module)  # which does nothing before there is a registry
        module.__dict__[ATTRIBUTE] = registry
    registry.add(plan, loaded=loaded, checks=checks, on_processed=on_processed)
    return registry


def _hook(module: nn.Module) -> None:
    """Have the module call its registry. May be called again, after an interrupt."""
    if guard not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(guard, prepend=True)
    if _after_load_state_dict not in module._load_state_dict_post_hooks.values():
        module.register_load_state_dict_post_hook(_after_load_state_dict)  # type: ignore[no-untyped-call]


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
    found = [registry for _, registry in registries(module)]
    for storage in {id(storage): storage for registry in found for storage in registry.storages()}.values():
        storage.accept()
    for registry in found:  # behind all: also one that is tied has a new version then
        for one in registry.derived.values():
            if one.is_undeclared and one.kernel is not None:
                one.put(one.kernel.memory, registry.versions_of(one))


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


def guard(module: nn.Module, args: Any) -> None:
    """The forward pre-hook: it refuses while the module is open (law 8).

    On a ready module it costs one look at the registry and at each name. Compiled callers do not run it: for them the
    kernel names themselves refuse, see [Note: open modules] in storage/kernel_name.py.

    Raises:
        StaleKernelError: the module is open, or its names were replaced.
    """
    if torch.compiler.is_compiling():
        return
    registry = registry_of(module)
    if registry is None:
        return
    if is_traced_by_jit():
        raise traced_by_jit(module=registry.label)
    if registry.readiness is not READY or not registry.is_bound:
        registry.need_ready()


def _after_load_state_dict(module: nn.Module, incompatible: Any) -> None:
    # load_state_dict(assign=True) replaces parameters: take them in at once, so that no address moves (law 3).
    registry = registry_of(module)
    if registry is not None and registry.replaced_names():
        with torch.no_grad():
            adopt(registry)
