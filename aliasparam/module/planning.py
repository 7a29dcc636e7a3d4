"""From declarations to a plan: every check that can be made before memory is touched."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import AliasError, DeclarationError
from ..layout import Layout
from ..spec import TensorSpec, other_kind
from ..storage.kernel_name import KernelName
from ..storage.overlap import check_memory
from ..storage.storage import AliasedStorage
from ..tensors.parameter import AliasedParameter, SavedName
from .declarations import Alias, AnyLayout, Declaration, Derivation, Policy, Reencoding
from .layout_of import layout_of, located
from .verdict import Reason, StoragePlan, aliasing_is_on, plan_storage


@dataclass
class Binding:
    """One checkpoint name: the module that shows it, and the parameter it shows."""

    module: nn.Module
    name: str
    parameter: AliasedParameter

    def __reduce__(self) -> Any:
        return Binding, (self.module, self.name, SavedName.of(self.parameter))


@dataclass
class Source:
    """One declared checkpoint tensor with its storage and every name bound to it."""

    name: str
    plan: StoragePlan
    derived: str | None  # the kernel name that lives in the storage
    layout: AnyLayout | None = None
    storage: AliasedStorage | None = None  # None while the module is on the meta device
    bindings: list[Binding] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Derived:
    """One derived tensor with memory of its own: a Derivation, or an alias that fell back to a copy."""

    declaration: Derivation
    fallback: StoragePlan | None = None
    layout: AnyLayout | None = None  # of the pair that fell back
    kernel: KernelName | None = None
    seen: tuple[int, ...] | None = None  # versions of its sources when it was computed
    version: int = 0


@dataclass(frozen=True)
class Separate:
    """A name which undeclared code derived, and which got memory of its own. See ported.py."""

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
        DeclarationError: an unknown source, a name used twice, a cycle, a layout that is none, or memory that overlaps or is on
            several devices.
    """
    sources: dict[str, Source] = {}
    derived: list[Derived] = []
    taken = set(taken)
    aliasing = aliasing and aliasing_is_on()
    wanted = [d if isinstance(d, Alias) else Alias(d.source, "") for d in declarations if not isinstance(d, Derivation)]
    for alias in wanted:
        _need_policy(label, alias)
        _need_free(label, taken, alias.source, alias.derived)
        source, copy = _pair(module, label, alias, aliasing=aliasing)
        sources[alias.source] = source
        derived += [copy] if copy is not None else []
    derivations = [d for d in declarations if isinstance(d, Derivation)]
    _need_free(label, taken, *(d.name for d in derivations))
    for name in (*(alias.derived for alias in wanted if alias.derived), *(d.name for d in derivations)):
        _need_unused(module, label, name)
    for derivation in derivations:
        derived.append(Derived(derivation))
        for name in derivation.sources:
            if name not in sources and name not in taken:
                taken.add(name)
                sources[name] = Source(name, plan_storage(_parameter_spec(module, label, name), None), None)
    parameters = {n: p for n, p in module._parameters.items() if p is not None and not is_lazy(p)}
    check_memory(
        label,
        {n: p for n, p in parameters.items() if n in sources},
        {n: p for n, p in parameters.items() if n not in sources},
    )
    return list(sources.values()), _in_order(derived, label)


def _pair(module: nn.Module, label: str, alias: Alias, *, aliasing: bool) -> tuple[Source, Derived | None]:
    """The source of one pair, and the copy where the pair cannot share memory."""
    spec = _parameter_spec(module, label, alias.source)
    layout = layout_of(label, alias, spec)
    plan = plan_for(label, alias, layout, spec, aliasing=aliasing)
    if not alias.derived or plan.reason.aliases:
        return Source(alias.source, plan, alias.derived or None, layout), None
    _report_fallback(label, alias, plan, aliasing)
    function = copying(layout, spec, plan.kernel.dtype)
    copied = Derivation(alias.derived, (alias.source,), function, plan.kernel.shape, plan.kernel.dtype)
    return Source(alias.source, plan_storage(spec, None), None), Derived(copied, fallback=plan, layout=layout)


def copying(layout: AnyLayout | None, spec: TensorSpec, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The function from checkpoint values to a kernel name with memory of its own."""
    if isinstance(layout, Reencoding):
        return layout.function
    return InOrder(plan_storage(spec, layout, kernel_dtype=dtype))


@dataclass(frozen=True)
class InOrder:
    """Checkpoint values, as a tensor of their own in kernel order."""

    plan: StoragePlan

    def __call__(self, values: Tensor) -> Tensor:
        return self.plan.bound.encode(values).view(self.plan.kernel.dtype)


def plan_for(label: str, alias: Alias, layout: AnyLayout | None, spec: TensorSpec, *, aliasing: bool = True) -> StoragePlan:
    """The plan of one pair, with errors that say whose it is."""
    if alias.dtype is not None and alias.dtype.itemsize != spec.dtype.itemsize:
        raise DeclarationError(
            "a kernel name shows the same elements, so its dtype has their width",
            module=label,
            name=alias.source,
            expected=f"a dtype of {spec.dtype.itemsize} bytes",
            found=alias.dtype,
            remedy="Give the kernel a view of another width where it is called, or declare a Reencoding.",
        )
    try:
        room = tuple(Layout(r) if isinstance(r, str) else r for r in alias.room_for)
        return plan_storage(spec, layout, kernel_dtype=alias.dtype, aliasing=aliasing, room_for=room)
    except AliasError as error:
        raise located(error, label, alias, spec) from None
    except Exception as error:
        raise DeclarationError(
            f"this layout failed on {spec}",
            module=label,
            name=alias.source,
            expected="a layout that takes this shape and dtype",
            found=f"{type(error).__name__}: {error}",
            remedy="Mend its functions.",
        ) from error


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
                remedy="Chain layouts with .then(), or derive from the derived name.",
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
    if (found := other_kind(parameter)) is not None:
        raise DeclarationError(
            "only strided tensors can be aliased",
            module=label,
            name=name,
            expected="a dense tensor",
            found=found,
            remedy="Register tensor.to_dense() instead.",
        )
    return TensorSpec.of(parameter)


def _report_fallback(label: str, alias: Alias, plan: StoragePlan, aliasing: bool) -> None:
    if not aliasing or alias.on_mismatch == "copy":
        return
    error = DeclarationError(
        f"{alias.derived!r} cannot share memory with its source: {plan.reason.value}",
        module=label,
        name=alias.source,
        expected=f"the bytes of {plan.source}",
        found=plan.kernel,
        remedy='Pass on_mismatch="copy" to give it memory of its own.',
    )
    if alias.on_mismatch == "error":
        raise error
    warnings.warn(str(error), stacklevel=5)


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
