"""`declare`: what a quantization method calls where it creates weights; and what a declared module does when it is called."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import DeclarationError
from ..tensors.call import count_collective_writes
from ..tensors.dispatch import traced_by_jit
from ..torch_private import import_what_dispatch_imports, is_traced_by_jit
from .adopt import adopt
from .declarations import Declaration
from .names import READY
from .registry import ATTRIBUTE, AliasRegistry, registry_of


def declare(module: nn.Module, *declarations: Declaration, loaded: bool = True, aliasing: bool = True) -> AliasRegistry:
    """Declare checkpoint names, kernel names and derivations of a module.

    Parameters named as sources become :class:`AliasedParameter`; kernel names become non-persistent buffers. On the meta
    device only the plan is made: memory is bound when :func:`process` finds a tensor under the name, and whatever it finds counts
    as loaded (also the uninitialized memory that ``Module.to_empty()`` makes: load it before processing).

    Of a Parameter with ``requires_grad=True`` a UserWarning says that it gets no gradients any more.

    Args:
        module: the module that owns the Parameters.
        declarations: :class:`Alias`, :class:`Derivation`, :class:`Keep`.
        loaded: whether the Parameters already hold checkpoint values; False for freshly allocated ones.
        aliasing: False gives every kernel name memory of its own (results must be the same; for tests and comparison).

    Returns:
        The module's registry.

    Raises:
        DeclarationError: a field of another kind, an unknown source, a name declared twice, a cycle, or a repack function that is
            no layout. The module is unchanged then.
        LayoutError: the layout does not exist for this shape or dtype.
    """
    if not isinstance(module, nn.Module):
        raise DeclarationError("declarations are of a module", expected="an nn.Module", found=type(module).__name__)
    registry = registry_of(module)
    if registry is not None:
        registry.add(declarations, loaded=loaded, aliasing=aliasing)
        return registry
    import_what_dispatch_imports()
    count_collective_writes()
    registry = AliasRegistry(module)
    registry.add(declarations, loaded=loaded, aliasing=aliasing)
    module.__dict__[ATTRIBUTE] = registry
    module.register_forward_pre_hook(guard, prepend=True)
    module.register_load_state_dict_post_hook(_after_load_state_dict)  # type: ignore[no-untyped-call]
    return registry


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
    # load_state_dict(assign=True) replaces parameters: take them in at once, so that no forward uses old kernel names.
    registry = registry_of(module)
    if registry is not None and registry.replaced_names():
        with torch.no_grad():
            adopt(registry)
