"""Two helpers with the names and the meaning SGLang gave them, built on the registry.

A ``process_weights_after_loading`` written for them moves by changing an import. What is kept: the derived tensor takes the
source's memory where shape and dtype are the same, and memory of its own otherwise. What is mended: nothing is broadcast,
no existing name's address moves, and the source name does not show kernel bytes as if they were checkpoint values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .errors import DeclarationError, PointerError, foreign_code, located
from .module.adopt import adopt, apart
from .module.declarations import Alias, need_wellformed
from .module.planning import Separate, parameter_spec
from .module.registry import AliasRegistry, need_model, registry_of
from .module.verbs import declare
from .module.verdict import Reason, aliasing_is_on, judge
from .spec import TensorSpec


def alias_or_bind_derived_param(
    module: nn.Module, source_name: str, derived_name: str, derived_value: Tensor | Callable[[Tensor], Tensor]
) -> None:
    """Put ``derived_value`` under ``derived_name``, in the source's memory where shape and dtype are the source's.

    After an alias the source name refuses to be read until it is written whole again: the bytes are kernel format, and nobody
    declared their order. Calling it again after a reload keeps every address.

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
        if registry is None or source is None:
            registry = declare(module, Alias(source_name, derived_name, derived_value))
        registry.process()
        return
    if (reason := _why_apart(module, registry, source_name, derived_name, derived_value)) is not None:
        copy_or_rebind_param(module, derived_name, derived_value)
        (registry or declare(module)).separate[derived_name] = Separate(source_name, reason, derived_value.nbytes)
        return
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
        source.need_storage("process").put_foreign(value)
    source.undeclared = value.numel() > 0  # what has no elements is LOADED at any time
    registry.commit_source(source_name)


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
    if not aliasing_is_on():
        return Reason.SWITCHED_OFF
    return Reason.OWN_MEMORY if source is None and _existing(module, derived_name) is not None else None


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
        existing = _existing(module, name)
        if existing is None:
            module.__dict__.pop(name, None)
            module.register_parameter(name, nn.Parameter(value.detach().clone(), requires_grad=False))
            return
    if TensorSpec.of(existing) != TensorSpec.of(value) or existing.device != value.device:
        raise PointerError(
            "this value does not fit the memory the name already has",
            module=type(module).__name__,
            name=name,
            expected=f"{TensorSpec.of(existing)} on {existing.device}",
            found=f"{TensorSpec.of(value)} on {value.device}",
            remedy="Declare the padded capacity at creation (aliasparam.declare), or free the name explicitly first.",
        )
    with torch.no_grad():
        existing.copy_(value)
