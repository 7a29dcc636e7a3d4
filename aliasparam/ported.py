"""Two helpers with the names and the meaning SGLang gave them, built on the registry.

A ``process_weights_after_loading`` written for them moves by changing an import. What is kept: the derived tensor takes the
source's memory where shape and dtype are the same, and memory of its own otherwise. What is mended: nothing is broadcast,
no existing name's address moves, and the source name does not show kernel bytes as if they were checkpoint values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .errors import DeclarationError, PointerError
from .module.adopt import adopt
from .module.declarations import Alias
from .module.planning import Separate, Source, parameter_spec
from .module.registry import registry_of
from .module.verbs import declare
from .module.verdict import Reason, aliasing_is_on, judge
from .spec import TensorSpec
from .tensors.faces import _Aliased
from .torch_private import shares_memory


def alias_or_bind_derived_param(
    module: nn.Module, source_name: str, derived_name: str, derived_value: Tensor | Callable[[Tensor], Tensor]
) -> None:
    """Put ``derived_value`` under ``derived_name``, in the source's memory where shape and dtype are the source's.

    After an alias the source name refuses to be read until it is written whole again, because the bytes are kernel format
    and nobody declared their order. Calling it again after a reload keeps every address.

    Given a repack *function* instead of its value, the layout is inferred, the pair is declared with it, and both names are right
    at any time; calling it again processes the module.

    Raises:
        DeclarationError: ``source_name`` is not a Parameter of ``module``, or the pair was declared with a layout.
        PointerError: a value of another shape or dtype for a name that already has memory.
    """
    registry = registry_of(module)
    source = registry.sources.get(source_name) if registry else None
    if not isinstance(derived_value, Tensor):
        if registry is None or (source is None and derived_name not in registry.derived):
            registry = declare(module, Alias(source_name, derived_name, derived_value))
        registry.process()
        return
    if source is not None and source.derived not in (None, derived_name):
        raise _declared_otherwise(module, source, f"for the kernel name {source.derived!r}")
    if (reason := _why_apart(module, source, source_name, derived_name, derived_value)) is not None:
        copy_or_rebind_param(module, derived_name, derived_value)
        (registry or declare(module)).separate[derived_name] = Separate(source_name, reason, derived_value.nbytes)
        return
    if source is not None and (source.layout is not None or source.derived is None):
        raise _declared_otherwise(module, source, "with a layout" if source.derived else "without a kernel name")
    value = _without_overlap(module, source, source_name, derived_value)
    if source is None or registry is None:
        registry = declare(module, Alias(source_name, derived_name))
        source = registry.sources[source_name]
    storage = source.need_storage("process", type(module).__name__)
    with torch.no_grad():
        adopt(registry)
        storage.put_foreign(value)
    registry.commit_source(source_name)


def _declared_otherwise(module: nn.Module, source: Source, how: str) -> DeclarationError:
    return DeclarationError(
        f"this source was declared {how}",
        module=type(module).__name__,
        name=source.name,
        expected="a source that was not declared, or a call of this helper for its kernel name again",
        found=f"kernel name {source.derived}, layout {source.layout}",
        remedy="Call aliasparam.process(module) instead, declare Alias with the kernel name's layout, or copy_or_rebind_param.",
    )


def _without_overlap(module: nn.Module, source: Source | None, name: str, value: Tensor) -> Tensor:
    """``value``, copied if it is a view of the very memory it is put into (``weight.t()`` of a square weight, say)."""
    target = module._parameters.get(name) if source is None or source.storage is None else source.storage.buffer
    if isinstance(value, _Aliased) or target is None or value.device.type == "meta":
        return value.detach().clone()
    return value.detach().clone() if shares_memory(value, target) else value.detach()


def _existing(module: nn.Module, name: str) -> Tensor | None:
    """The tensor that lives under ``name``: it stays where it is."""
    found: Tensor | None = module._parameters.get(name)
    return module._buffers.get(name) if found is None else found


def _why_apart(module: nn.Module, source: Source | None, name: str, derived_name: str, value: Tensor) -> Reason | None:
    """Undeclared code promises no padding and no inverse, so only the very same shape and dtype can share memory."""
    if source is not None and source.storage is not None:
        spec, device = source.plan.source, source.storage.buffer.device
    else:
        try:
            spec, device = parameter_spec(module, name), module.get_parameter(name).device
        except DeclarationError as error:
            raise error.located(module=type(module).__name__) from error.__cause__
    if value.device != device:
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
