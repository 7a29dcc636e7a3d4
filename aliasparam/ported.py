"""Two helpers with the names and the meaning SGLang gave them, built on the registry.

A ``process_weights_after_loading`` written for them moves by changing an import. What is kept: the derived tensor takes the
source's memory where shape and dtype are the same, and memory of its own otherwise. What is mended: nothing is broadcast,
no existing name's address moves, and the source name does not show kernel bytes as if they were checkpoint values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from .errors import DeclarationError, PointerError, foreign_code, located
from .module.adopt import adopt, apart
from .module.declarations import Alias, Derivation, Keep, need_wellformed
from .module.planning import Derived, Source, need_once, need_unused, nobody_declared, parameter_spec
from .module.registry import AliasRegistry, need_model, registry_of
from .module.verbs import declare
from .module.verdict import Reason, aliasing_is_on, judge
from .spec import TensorSpec
from .storage.kernel_name import KernelName
from .storage.transaction import landable
from .tensors.faces import _Aliased
from .torch_private import outside_inference, shares_memory


def alias_or_bind_derived_param(
    module: nn.Module, source_name: str, derived_name: str, derived_value: Tensor | Callable[[Tensor], Tensor]
) -> None:
    """Put ``derived_value`` under ``derived_name``, in the source's memory where shape and dtype are the source's.

    After an alias the source name refuses to be read until it is written whole again: the bytes are kernel format, and nobody
    declared their order. Once the source is written the module refuses until this is called again; no address changes.

    Given a repack *function* instead of its value, the layout is inferred, the pair is declared with it, and both names are right
    at any time; calling it again processes the module.

    Raises:
        DeclarationError: ``source_name`` is not a Parameter of ``module``, or the pair was declared with a layout.
        PointerError: a value of another shape or dtype for a name that already has memory.
    """
    need_model(module)
    with located(module=type(module).__name__):
        need_wellformed([Alias(source_name, derived_name)])
    source = registry.sources.get(source_name) if (registry := registry_of(module)) else None
    if not isinstance(derived_value, Tensor):
        if registry is None or derived_name not in registry.kernel_names():
            registry = declare(module, Alias(source_name, derived_name, derived_value))
        registry.process()
        return
    if (reason := _why_apart(module, registry, source_name, derived_name, derived_value)) is not None:
        _put_apart(registry or declare(module), source_name, derived_name, derived_value, reason)
        return
    derived_value = _landable(derived_value)
    if registry is not None and source is not None and not source.derived:
        _show_in_storage(registry, source, derived_name)
    if source is not None and (source.layout is not None or source.derived != derived_name):
        other = f"for the kernel name {source.derived!r}" if source.derived else "without a kernel name"
        raise DeclarationError(
            f"this source was declared {'with a layout' if source.derived == derived_name else other}",
            module=type(module).__name__,
            name=source_name,
            expected="a source that was not declared, or a call of this helper for its kernel name again",
            found=f"kernel name {source.derived}, layout {source.layout}",
            remedy="Call aliasparam.process(module) instead, declare the kernel name's layout, or copy_or_rebind_param.",
        )
    if registry is None or source is None:
        registry = registry or declare(module)
        plan = registry.planned([Alias(source_name, derived_name)], aliasing=True)
        source = plan[0][0][0]
        source.undeclared = derived_value.numel() > 0  # before it is there: an interrupt leaves a refusal
        registry.add(plan, loaded=True)
    value = apart(registry, derived_value)
    with torch.no_grad():
        adopt(registry)
        storage, before = source.need_storage("process"), source.version
        storage.put_foreign(value)
    registry.same_values(storage, before)  # which kernel bytes were made of
    source.undeclared = value.numel() > 0  # what has no elements is LOADED at any time
    registry.commit_source(source_name)


def _put_apart(registry: AliasRegistry, source_name: str, name: str, value: Tensor, reason: Reason) -> None:
    """``value`` in memory of its own, which is right until the source is written again."""
    module, one = registry.module, registry.derived.get(name)
    value = _landable(apart(registry, value))
    kept, _ = registry.planned([Keep(source_name)] if source_name not in registry.sources else [], aliasing=True)
    source = registry.sources.get(source_name) or kept[0][0]
    declaration = Derivation(name, (source_name,), nobody_declared, *TensorSpec.of(value))
    existing = _fitting(module, name, value)
    if one is None or not one.is_undeclared:
        taken = [source.buffer for source in registry.storages()] + [held for _, held in kept]
        again = existing is not None and (isinstance(existing, _Aliased) or any(shares_memory(existing, t) for t in taken))
        with located(module=registry.label):
            need_once([*registry.sources, *registry.kernel_names(), name, *[name] * again])
        if existing is None:
            copy_or_rebind_param(module, name, value)
        home = registry.device() or module.get_parameter(source_name).device
        with outside_inference():  # also what was made in inference mode is written anywhere
            memory = torch.empty(0, dtype=value.dtype, device=value.device).set_(getattr(module, name).data)
        plan = replace(source.plan, kernel=declaration.spec, layout=None, reason=reason)
        one = Derived(declaration, plan, KernelName(f"{registry.label}.{name}", memory), home=home)
    registry.add((kept, [one]), loaded=True)
    one.declaration, one.seen = declaration, None  # an interrupt leaves a refusal
    with torch.no_grad():
        adopt(registry)
        one.put(value, registry.versions_of(one))
    if source.undeclared or not source.derived:  # else processing has to see what is new
        registry.commit_source(source_name)
    registry.close_if_unchanged()


def _landable(value: Tensor) -> Tensor:
    """The value for memory of its dtype. What torch cannot copy raises here, before anything changes."""
    return landable(value, torch.empty(0, dtype=value.dtype, device=value.device))


def _show_in_storage(registry: AliasRegistry, source: Source, name: str) -> None:
    """Give a source a kernel name, as if it were the first, where only undeclared code derived others."""
    users = (one for one in registry.derived.values() if source.name in one.declaration.sources)
    if {one.is_undeclared for one in users} != {True}:
        return
    need_unused(registry.module, name)
    storage = source.need_storage("process")
    registry.open()
    source.undeclared = True  # before it is there: an interrupt leaves a refusal
    with storage.lock:
        storage.kernel_dtype = source.plan.kernel.dtype
        storage.move(None)
    source.derived = name
    registry.relabel(registry.label)


def _existing(module: nn.Module, name: str) -> Tensor | None:
    """The tensor that lives under ``name``: it stays where it is."""
    return module._parameters.get(name, module._buffers.get(name))


def _why_apart(module: nn.Module, registry: AliasRegistry | None, name: str, derived_name: str, value: Tensor) -> Reason | None:
    """Undeclared code promises no padding and no inverse, so only the very same shape and dtype can share memory."""
    source = registry.sources.get(name) if registry else None
    with located(module=type(module).__name__, name=name):
        spec = source.plan.source if source else parameter_spec(module, name)
    if value.device != ((registry.device() if registry else None) or module.get_parameter(name).device):
        return Reason.OTHER_DEVICE
    if spec != TensorSpec.of(value):
        verdict = judge(spec, TensorSpec.of(value))
        return Reason.UNDECLARED_SHAPE if verdict.aliases else verdict
    if source is not None and source.derived == derived_name:
        return None
    if not aliasing_is_on():
        return Reason.SWITCHED_OFF
    return None if _existing(module, derived_name) is None else Reason.OWN_MEMORY


def copy_or_rebind_param(module: nn.Module, name: str, value: Tensor) -> None:
    """Put ``value`` under ``name``: copied into the existing memory, or bound as a new Parameter where there is none.

    Raises:
        DeclarationError: the value is no tensor.
        PointerError: the name has memory of another shape, dtype or device: rebinding would move an address.
    """
    if not isinstance(value, Tensor):
        raise DeclarationError(
            "this value is no tensor",
            module=type(module).__name__,
            name=name,
            expected="a tensor to copy or to bind",
            found=repr(value)[:80],
            remedy="Call the function on the source first, or give it to alias_or_bind_derived_param.",
        )
    need_model(module)
    remedy = "Choose another name: no dots, and none that the module uses for something else."
    facts = {"module": type(module).__name__, "name": name, "expected": "a name for a Parameter", "remedy": remedy}
    with foreign_code("no value can be put under this name", DeclarationError, **facts):
        existing = _fitting(module, name, value)
        if existing is None:
            module.__dict__.pop(name, None)
            module.register_parameter(name, nn.Parameter(value.detach().clone(), requires_grad=False))
            return
    with torch.no_grad():
        existing.copy_(value)


def _fitting(module: nn.Module, name: str, value: Tensor) -> Tensor | None:
    """The tensor that lives under ``name``. Raises PointerError where the value does not fit it."""
    existing = _existing(module, name)
    if existing is not None and (TensorSpec.of(existing) != TensorSpec.of(value) or existing.device != value.device):
        raise PointerError(
            "this value does not fit the memory the name already has",
            module=type(module).__name__,
            name=name,
            expected=f"{TensorSpec.of(existing)} on {existing.device}",
            found=f"{TensorSpec.of(value)} on {value.device}",
            remedy="Declare the padded capacity at creation (aliasparam.declare), or free the name explicitly first.",
        )
    return existing
