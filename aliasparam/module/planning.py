"""From declarations to a plan: every check that can be made before memory is touched."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import AliasError, DeclarationError, LayoutError, StateError
from ..spec import TensorSpec, other_kind
from ..storage.kernel_name import KernelName
from ..storage.storage import AliasedStorage
from ..tensors.parameter import AliasedParameter, SavedName
from .declarations import Alias, AnyLayout, Declaration, Derivation, Order, Reencoding
from .verdict import Reason, StoragePlan, aliasing_is_on, layout_of, plan_storage


@dataclass(slots=True)
class Binding:
    """One checkpoint name: the module that shows it, and the parameter it shows.

    ``below``: the module was seen below the one that declared the name, so another in its place is meant to be used instead.
    """

    module: nn.Module
    name: str
    parameter: AliasedParameter
    below: bool = False

    def __reduce__(self) -> Any:
        return Binding, (self.module, self.name, SavedName.of(self.parameter), self.below)


@dataclass(slots=True)
class Source:
    """One declared checkpoint tensor with its storage and every name bound to it."""

    name: str
    plan: StoragePlan
    derived: str | None  # the kernel name that lives in the storage
    storage: AliasedStorage | None = None  # None while the module is on the meta device
    bindings: list[Binding] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def layout(self) -> Order | None:
        return self.plan.layout

    @property
    def kernel(self) -> KernelName | None:
        return None if self.storage is None else self.storage.kernel_name

    def need_storage(self, doing: str, module: str | None = None) -> AliasedStorage:
        """Its storage. Raises StateError while it is on the meta device."""
        if self.storage is None:
            raise StateError(
                f"cannot {doing} a name which is still on the meta device",
                module=module,
                name=self.name,
                expected="a loaded tensor",
                found="a placeholder on meta",
                remedy="Load the module's weights first.",
            )
        return self.storage

    @property
    def version(self) -> int:
        return -1 if self.storage is None else self.storage.version

    def is_of(self, version: int | None) -> bool:
        """Whether the kernel name may be used, and holds what this version of the storage does."""
        moved = self.kernel is not None and self.kernel.was_moved
        return not moved and self.storage is not None and self.storage.is_loaded and self.storage.version == version


@dataclass(slots=True)
class Derived:
    """One derived tensor with memory of its own: a Derivation, or an alias that fell back to a copy."""

    declaration: Derivation
    fallback: StoragePlan | None = None
    layout: AnyLayout | None = None  # of the pair that fell back
    kernel: KernelName | None = None
    seen: tuple[int, ...] | None = None  # versions of its sources when it was computed
    version: int = 0

    def need_kernel(self) -> KernelName:
        if self.kernel is None:
            raise AssertionError(f"{self.declaration.name}: derived before it has memory")
        return self.kernel


Plan: TypeAlias = tuple[list[Source], list[Derived]]  #: What a list of declarations asks for.


@dataclass(frozen=True)
class Separate:
    """A name which undeclared code derived, and which got memory of its own. See ported.py."""

    source: str
    reason: Reason
    nbytes: int


def planned(module: nn.Module, declarations: Sequence[Declaration], taken: set[str], *, aliasing: bool) -> Plan:
    """What a list of declarations asks for, checked as a whole; nothing is allocated or bound.

    Args:
        module: owner of the Parameters.
        declarations: as given to :func:`declare`.
        taken: names declared before.
        aliasing: False turns every pair into a copy.

    Raises:
        DeclarationError: an unknown source, a name used twice, a cycle, or a layout that is none.
    """
    sources: dict[str, Source] = {}
    derived: list[Derived] = []
    taken = set(taken)
    aliasing = aliasing and aliasing_is_on()
    wanted = [d if isinstance(d, Alias) else Alias(d.source, "") for d in declarations if not isinstance(d, Derivation)]
    for alias in wanted:
        _need_free(taken, alias.source, alias.derived)
        try:
            source, copy = _pair(module, alias, aliasing=aliasing)
        except AliasError as error:
            raise error.located(name=alias.source) from error.__cause__
        sources[alias.source] = source
        derived += [copy] if copy is not None else []
    derivations = [d for d in declarations if isinstance(d, Derivation)]
    _need_free(taken, *(d.name for d in derivations))
    for name in (*(alias.derived for alias in wanted if alias.derived), *(d.name for d in derivations)):
        _need_unused(module, name)
    for derivation in derivations:
        derived.append(Derived(derivation))
        for name in derivation.sources:
            if name not in sources and name not in taken:
                taken.add(name)
                sources[name] = Source(name, plan_storage(parameter_spec(module, name), None), None)
    return list(sources.values()), _in_order(derived)


def _pair(module: nn.Module, alias: Alias, *, aliasing: bool) -> tuple[Source, Derived | None]:
    """The source of one pair, and the copy where the pair cannot share memory."""
    spec = parameter_spec(module, alias.source)
    layout, plan = plan_of(alias, spec, aliasing=aliasing)
    if not isinstance(layout, Reencoding) and (not alias.derived or plan.reason.aliases):
        return Source(alias.source, plan, alias.derived or None), None
    if aliasing:
        _report_fallback(alias, plan)
    function = layout.function if isinstance(layout, Reencoding) else InOrder(plan)
    copied = Derivation(alias.derived, (alias.source,), function, plan.kernel.shape, plan.kernel.dtype)
    return Source(alias.source, plan_storage(spec, None), None), Derived(copied, fallback=plan, layout=layout)


@dataclass(frozen=True)
class InOrder:
    """Checkpoint values, as a tensor of their own in kernel order."""

    plan: StoragePlan

    def __call__(self, values: Tensor) -> Tensor:
        return self.plan.bound.encode(values).view(self.plan.kernel.dtype)


def plan_of(alias: Alias, spec: TensorSpec, *, aliasing: bool = True) -> tuple[AnyLayout | None, StoragePlan]:
    """The layout and the plan of one pair. Raises DeclarationError or LayoutError, which say of what shape and dtype."""
    if alias.dtype is not None and alias.dtype.itemsize != spec.dtype.itemsize:
        raise DeclarationError(
            "a kernel name shows the same elements, so its dtype has their width",
            expected=f"a dtype of {spec.dtype.itemsize} bytes",
            found=alias.dtype,
            remedy="Give the kernel a view of another width where it is called, or declare a Reencoding.",
        )
    try:
        layout = layout_of(alias.layout, spec)
        room = tuple(layout_of(other, spec) for other in alias.room_for)
        return layout, plan_storage(spec, layout, kernel_dtype=alias.dtype, aliasing=aliasing, room_for=room)
    except (DeclarationError, LayoutError) as error:
        raise error.located(
            expected=f"a shape and dtype that {alias.layout} takes",
            found=spec,
            remedy="Pad with a ragged leading digit, reshape the tensor first, or declare another layout.",
        ) from error.__cause__
    except Exception as error:
        raise DeclarationError(
            f"this layout failed on {spec}",
            expected="a layout that takes this shape and dtype",
            found=f"{type(error).__name__}: {error}",
            remedy="Mend its functions.",
        ) from error


def _need_free(taken: set[str], *names: str) -> None:
    for name in filter(None, names):
        if name in taken:
            raise DeclarationError(
                "this name is declared twice",
                name=name,
                expected="each source and each derived name in one declaration",
                found="a name that a declaration has already",
                remedy="Chain layouts with .then(), or derive from the derived name.",
            )
        taken.add(name)


def _need_unused(module: nn.Module, name: str) -> None:
    """Refuse a kernel name which would take the place of something that the module has: it would be lost without a word."""
    held = getattr(module, name, None)
    if held is None and "." not in name:
        return
    raise DeclarationError(
        "this kernel name is taken",
        name=name,
        expected="a name that the module does not use",
        found="a dotted name" if held is None else f"{_described(held)} under it",
        remedy="Choose another name, or delete what is there first if nobody holds its address.",
    )


def _described(held: Any) -> str:
    kind = type(held).__name__
    return f"{kind} {TensorSpec.of(held)}" if isinstance(held, Tensor) and not is_lazy(held) else kind


def parameter_spec(module: nn.Module, name: str) -> TensorSpec:
    """Raises DeclarationError unless ``name`` is a Parameter that can be a source."""
    parameter = module._parameters.get(name)
    if parameter is None:
        raise DeclarationError(
            "a declared source must be a registered Parameter of the module",
            name=name,
            expected="the name of a Parameter",
            found=f"parameters {sorted(n for n, p in module._parameters.items() if p is not None)}",
            remedy="Register it first: module.register_parameter(name, nn.Parameter(..., requires_grad=False)).",
        )
    if (found := other_kind(parameter)) is not None:
        raise DeclarationError(
            "this Parameter has no memory of its own to alias",
            name=name,
            expected="a dense tensor with shape and dtype",
            found=found,
            remedy="Register tensor.to_dense(), materialize a lazy module first, or declare before sharding, each rank its part.",
        )
    return TensorSpec.of(parameter)


def _report_fallback(alias: Alias, plan: StoragePlan) -> None:
    if alias.on_mismatch == "copy":
        return
    error = DeclarationError(
        f"{alias.derived!r} cannot share memory with its source: {plan.reason.value}",
        name=alias.source,
        expected=f"the bytes of {plan.source}",
        found=plan.kernel,
        remedy='Pass on_mismatch="copy" to give it memory of its own.',
    )
    if alias.on_mismatch == "error":
        raise error
    warnings.warn(str(error), stacklevel=6)


def _in_order(derived: Sequence[Derived]) -> list[Derived]:
    """Derivations with what they derive from before them. Raises DeclarationError on a cycle."""
    by_name = {d.declaration.name: d for d in derived}
    if all(by_name.keys().isdisjoint(d.declaration.sources) for d in derived):
        return list(derived)  # as nearly always
    try:
        order = list(TopologicalSorter({name: d.declaration.sources for name, d in by_name.items()}).static_order())
    except CycleError as error:
        cycle = error.args[1]
        raise DeclarationError(
            "derivations form a cycle",
            name=cycle[0],
            expected="derivations that lead back to checkpoint names",
            found=" -> ".join(reversed(cycle)),
            remedy="Derive one of them from a checkpoint name.",
        ) from None
    return [by_name[name] for name in order if name in by_name]
