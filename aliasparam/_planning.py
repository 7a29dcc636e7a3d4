"""From declarations to a plan: every check that can be made before memory is touched."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ._declare import Alias, Declaration, Derivation, Keep, Policy
from ._kernel_name import KernelName
from ._overlap import check_memory
from ._parameter import AliasedParameter
from ._probe import check_declared
from ._storage import AliasedStorage
from ._transform import Identity, TensorSpec, Transform
from ._verdict import Reason, StoragePlan, aliasing_is_on, plan_storage
from .errors import AliasError, DeclarationError


@dataclass
class Binding:
    """One checkpoint name: the module that shows it, and the parameter it shows."""

    module: nn.Module
    name: str
    parameter: AliasedParameter


@dataclass
class Source:
    """One declared checkpoint tensor with its storage and every name bound to it."""

    name: str
    plan: StoragePlan
    derived: str | None  # the kernel name that lives in the storage
    storage: AliasedStorage | None = None  # None while the module is on the meta device
    bindings: list[Binding] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Derived:
    """One derived tensor with memory of its own: a Derivation, or an alias that fell back to a copy."""

    declaration: Derivation
    fallback: StoragePlan | None = None
    kernel: KernelName | None = None
    seen: tuple[int, ...] | None = None  # generations of its sources when it was computed
    generation: int = 0


@dataclass(frozen=True)
class Separate:
    """A name which undeclared code derived, and which got memory of its own. See _ported.py."""

    source: str
    reason: Reason
    nbytes: int


def planned(
    module: nn.Module, label: str, declarations: Sequence[Declaration], taken: set[str], *, aliasing: bool
) -> tuple[list[Source], list[Derived]]:
    """What a list of declarations asks for, checked as a whole; nothing is allocated or bound.

    Args:
        module: owner of the Parameters.
        label: its name in messages.
        declarations: as given to :func:`declare`.
        taken: names declared before.
        aliasing: False turns every pair into a copy.

    Raises:
        DeclarationError: an unknown source, a name used twice, a cycle, a transform that does not invert, or memory that
            overlaps or is on several devices.
    """
    sources: dict[str, Source] = {}
    derived: list[Derived] = []
    taken = set(taken)
    aliasing = aliasing and aliasing_is_on()
    wanted = [d for d in declarations if isinstance(d, Alias)]
    wanted += [Alias(d.source, "") for d in declarations if isinstance(d, Keep)]
    for alias in wanted:
        _need_policy(label, alias)
        _need_free(label, taken, alias.source, alias.derived)
        spec = _parameter_spec(module, label, alias.source)
        plan = _plan(label, alias, spec, aliasing=aliasing)
        if alias.transform.invertible and alias.transform.lossless and not alias.transform.is_identity_for(spec):
            probe_transform(label, alias.source, alias.transform, spec)
        fell_back = bool(alias.derived) and not plan.reason.aliases
        if fell_back:
            _report_fallback(label, alias, plan, aliasing)
            derived.append(Derived(_copy_derivation(alias, plan), fallback=plan))
            plan_here = plan_storage(spec, Identity())
        else:
            plan_here = plan
        sources[alias.source] = Source(alias.source, plan_here, None if fell_back else alias.derived or None)
    derivations = [d for d in declarations if isinstance(d, Derivation)]
    _need_free(label, taken, *(d.name for d in derivations))
    for name in (*(alias.derived for alias in wanted if alias.derived), *(d.name for d in derivations)):
        _need_unused(module, label, name)
    for derivation in derivations:
        derived.append(Derived(derivation))
        for name in derivation.sources:
            if name not in sources and name not in taken:
                taken.add(name)
                sources[name] = Source(name, plan_storage(_parameter_spec(module, label, name), Identity()), None)
    parameters = {n: p for n, p in module._parameters.items() if p is not None and not is_lazy(p)}
    check_memory(
        label,
        {n: p for n, p in parameters.items() if n in sources},
        {n: p for n, p in parameters.items() if n not in sources},
    )
    return list(sources.values()), _in_order(derived, label)


def _need_policy(label: str, alias: Alias) -> None:
    if alias.on_mismatch not in get_args(Policy):
        raise DeclarationError(
            "no such policy",
            module=label,
            name=alias.source,
            expected=f"on_mismatch of {', '.join(map(repr, get_args(Policy)))}",
            found=repr(alias.on_mismatch),
            remedy="'copy' is the default.",
        )


def _need_free(label: str, taken: set[str], *names: str) -> None:
    for name in filter(None, names):
        if name in taken:
            raise DeclarationError(
                "this name is declared twice",
                module=label,
                name=name,
                expected="each source and each derived name in one declaration",
                found="a name that a declaration has already",
                remedy="Chain transforms with .then(), or derive from the derived name.",
            )
        taken.add(name)


def _need_unused(module: nn.Module, label: str, name: str) -> None:
    """Refuse a kernel name which would take the place of something that the module has: it would be lost without a word."""
    if "." in name:
        found = "a dotted name"
    elif name in module._parameters or name in module._buffers:
        held = module._parameters.get(name, module._buffers.get(name))
        found = "" if held is None else f"a tensor {TensorSpec.of(held)} under it"
    elif name in module._modules:
        found = f"a module under it, {type(module._modules[name]).__name__}"
    else:
        held = getattr(module, name, None)
        found = "" if held is None else f"an attribute of the module, {type(held).__name__}"
    if found:
        raise DeclarationError(
            "this kernel name is taken",
            module=label,
            name=name,
            expected="a name that the module does not use",
            found=found,
            remedy="Choose another name, or delete what is there first if nobody holds its address.",
        )


def _parameter_spec(module: nn.Module, label: str, name: str) -> TensorSpec:
    parameter = module._parameters.get(name)
    if parameter is not None and is_lazy(parameter):
        raise DeclarationError(
            "the shape of this Parameter is not known yet",
            module=label,
            name=name,
            expected="a Parameter with shape and dtype",
            found=type(parameter).__name__,
            remedy="Materialize it first: parameter.materialize(shape), or a first forward of the lazy module.",
        )
    if parameter is None:
        raise DeclarationError(
            "a declared source must be a registered Parameter of the module",
            module=label,
            name=name,
            expected="the name of a Parameter",
            found=f"parameters {sorted(n for n, p in module._parameters.items() if p is not None)}",
            remedy="Register it first: module.register_parameter(name, nn.Parameter(..., requires_grad=False)).",
        )
    if parameter.layout is not torch.strided:
        raise DeclarationError(
            "only strided tensors can be aliased",
            module=label,
            name=name,
            expected="torch.strided",
            found=parameter.layout,
            remedy="Register tensor.to_dense() instead.",
        )
    return TensorSpec.of(parameter)


def _plan(label: str, alias: Alias, spec: TensorSpec, *, aliasing: bool) -> StoragePlan:
    try:
        return plan_storage(spec, alias.transform, aliasing=aliasing, room_for=alias.room_for)
    except AliasError as error:  # a transform knows neither the module nor the name
        raise error.located(
            module=label,
            name=alias.source,
            expected=f"a shape and dtype that {alias.transform} takes",
            found=spec,
            remedy="Pad or reshape the tensor first (PadLast2), or declare another transform.",
        ) from None


def probe_transform(label: str, name: str, transform: Transform, spec: TensorSpec) -> None:
    """Check the laws of ``transform`` on probes of ``spec``. See [Note: probe size] in _probe.py.

    Raises:
        DeclarationError: it breaks one, or it raises.
    """
    key = (transform, spec)
    if key in _probed:
        return
    try:
        check_declared(transform, spec)
    except AliasError as error:
        raise DeclarationError(
            error.message,
            module=label,
            name=name,
            expected=error.expected if error.expected is not None else f"a transform that takes {spec}",
            found=error.found if error.found is not None else spec,
            remedy=error.remedy or "Pad or reshape the tensor first, or declare another transform.",
        ) from error
    except Exception as error:
        raise DeclarationError(
            f"the transform {transform} failed on a probe of {spec}",
            module=label,
            name=name,
            expected="forward and inverse that take any checkpoint bytes of this shape and dtype",
            found=f"{type(error).__name__}: {error}",
            remedy="Mend the transform, or raise TransformError in output_spec() where the format does not exist.",
        ) from error
    _probed.add(key)


def _report_fallback(label: str, alias: Alias, plan: StoragePlan, aliasing: bool) -> None:
    if not aliasing or alias.on_mismatch == "copy":
        return
    error = DeclarationError(
        f"{alias.derived!r} cannot share memory with its source: {plan.reason.value}",
        module=label,
        name=alias.source,
        expected=f"the bytes of {plan.source}",
        found=plan.derived,
        remedy='Pass on_mismatch="copy" to give it memory of its own.',
    )
    if alias.on_mismatch == "error":
        raise error
    warnings.warn(str(error), stacklevel=5)


#: (transform, probe) pairs whose inverse was found right.
_probed: set[tuple[Any, TensorSpec]] = set()


def _copy_derivation(alias: Alias, plan: StoragePlan) -> Derivation:
    return Derivation(alias.derived, (alias.source,), alias.transform.forward, plan.derived.shape, plan.derived.dtype)


def _in_order(derived: list[Derived], label: str) -> list[Derived]:
    """Derivations with what they derive from before them. Raises DeclarationError on a cycle."""
    by_name = {d.declaration.name: d for d in derived}
    ordered: list[Derived] = []
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            raise DeclarationError(
                "derivations form a cycle",
                module=label,
                name=name,
                expected="derivations that lead back to checkpoint names",
                found=" -> ".join((*trail, name)),
                remedy="Derive one of them from a checkpoint name.",
            )
        if name in done or name not in by_name:
            return
        for source in by_name[name].declaration.sources:
            visit(source, (*trail, name))
        done.add(name)
        ordered.append(by_name[name])

    for name in by_name:
        visit(name, ())
    return ordered
