"""From declarations to a plan: every check that can be made before memory is touched."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..errors import DeclarationError, StateError, located
from ..spec import TensorSpec, other_kind
from ..storage.kernel_name import KernelName
from ..storage.states import State
from ..storage.storage import AliasedStorage
from ..tensors.parameter import AliasedParameter, SavedName
from .declarations import Alias, AnyLayout, Declaration, Derivation, Order, Reencoding
from .verdict import Reason, StoragePlan, plan_of


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
    undeclared: bool = False  # undeclared code makes kernel bytes of what is loaded: see ported.py

    @property
    def is_loaded(self) -> bool:
        """Whether the kernel name may be used: everything arrived, or undeclared code has put its bytes there if it has to."""
        storage, right = self.storage, State.FOREIGN if self.undeclared else State.LOADED
        return storage is not None and storage.state is right and storage.exposed is None

    @property
    def layout(self) -> Order | None:
        """The order of its memory."""
        return None if isinstance(self.plan.layout, Reencoding) else self.plan.layout

    @property
    def kernel(self) -> KernelName | None:
        return None if self.storage is None else self.storage.kernel_name

    def need_storage(self, doing: str) -> AliasedStorage:
        """Its storage. Raises StateError while it is on the meta device."""
        if self.storage is None:
            raise StateError(
                f"cannot {doing} a name which is still on the meta device",
                name=self.name,
                expected="a loaded tensor",
                found="a placeholder on meta",
                remedy="Load the module's weights first.",
            )
        return self.storage

    @property
    def version(self) -> int:
        return -1 if self.storage is None else self.storage.version


@dataclass(slots=True)
class Derived:
    """One derived tensor with memory of its own: a Derivation, or an alias that fell back to a copy. What undeclared code derived
    is one whose function nobody declared: right until its source is written again (see ported.py)."""

    declaration: Derivation
    fallback: StoragePlan | None = None
    kernel: KernelName | None = None
    seen: tuple[int, ...] | None = None  # versions of its sources when it was computed
    version: int = 0
    home: torch.device | None = None  # of its sources; what undeclared code gives it may be elsewhere

    def put(self, value: Tensor, versions: tuple[int, ...]) -> None:
        """``value`` is what sources of these versions come to."""
        if (kernel := self.kernel) is None:
            raise AssertionError(f"{self.declaration.name}: a value without memory")
        self.seen = None  # an interrupted copy is of no version
        self.version += 1
        kernel.memory.copy_(value)
        kernel.accept()  # whatever other code wrote there is gone
        self.seen = versions

    @property
    def is_undeclared(self) -> bool:
        return self.declaration.function is nobody_declared

    @property
    def layout(self) -> AnyLayout | None:
        """Of the pair that fell back."""
        return None if self.fallback is None else self.fallback.layout


def nobody_declared(*values: Tensor, name: str | None = None) -> NoReturn:
    """The function of what undeclared code derives: it has not since the source was written."""
    raise StateError(
        "cannot process: nobody declared what makes kernel bytes of this weight",
        name=name,
        expected="a value, put by alias_or_bind_derived_param since the last load",
        found="none since then, or one that other code wrote",
        remedy="Call it with the new value; or give it the function, or declare the layout: then processing is enough.",
    )


def planned(
    module: nn.Module, declarations: Sequence[Declaration], taken: set[str], *, aliasing: bool
) -> tuple[list[Source], list[Derived]]:
    """What a list of declarations asks for, checked as a whole; nothing is allocated or bound.

    Args:
        module: owner of the Parameters.
        declarations: as given to :func:`declare`.
        taken: names declared before.
        aliasing: False turns every pair into a copy.

    Raises:
        DeclarationError: an unknown source, a name used twice, a cycle, or a layout that is none.
    """
    derivations = [d for d in declarations if isinstance(d, Derivation)]
    pairs = [d if isinstance(d, Alias) else Alias(d.source, "") for d in declarations if not isinstance(d, Derivation)]
    kernel_names = [pair.derived for pair in pairs if pair.derived] + [d.name for d in derivations]
    known = [*taken, *(pair.source for pair in pairs), *kernel_names]
    need_once(known)
    read = dict.fromkeys(name for d in derivations for name in d.sources if name not in known)
    sources, derived = [], list[Derived]()
    for pair in [*pairs, *(Alias(name, "") for name in read)]:
        with located(name=pair.source):
            source, copy = _pair(module, pair, aliasing=aliasing)
        sources.append(source)
        derived += [copy] if copy is not None else []
    for name in kernel_names:
        need_unused(module, name)
    return sources, in_order([*derived, *map(Derived, derivations)])


def _pair(module: nn.Module, alias: Alias, *, aliasing: bool) -> tuple[Source, Derived | None]:
    """The source of one pair, and the copy where the pair cannot share memory."""
    spec = parameter_spec(module, alias.source)
    plan = plan_of(alias, spec)
    if not alias.derived or (aliasing and plan.reason.aliases):
        return Source(alias.source, plan, alias.derived or None), None
    if aliasing:
        _report_fallback(alias, plan)
    else:
        plan = replace(plan, reason=Reason.SWITCHED_OFF)
    function = plan.layout.function if isinstance(plan.layout, Reencoding) else InOrder(plan)
    copied = Derivation(alias.derived, (alias.source,), function, *plan.kernel)
    return Source(alias.source, plan_of(Alias(alias.source, ""), spec), None), Derived(copied, plan)


@dataclass(frozen=True)
class InOrder:
    """Checkpoint values, as a tensor of their own in kernel order."""

    plan: StoragePlan

    def __call__(self, values: Tensor) -> Tensor:
        return self.plan.bound.encode(values).view(self.plan.kernel.dtype)


def need_once(names: Sequence[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise DeclarationError(
                "this name is declared twice",
                name=name,
                expected="each source and each derived name in one declaration",
                found="a name that a declaration has already",
                remedy="Chain layouts with .then(), or derive from the derived name.",
            )


def need_unused(module: nn.Module, name: str) -> None:
    """Refuse a kernel name which would take the place of something that the module has: it would be lost without a word."""
    held = getattr(module, name, None)
    if held is None and "." not in name:
        return
    raise DeclarationError(
        "this kernel name is taken",
        name=name,
        expected="a name that the module does not use",
        found="a dotted name" if held is None else f"{type(held).__name__} {list(getattr(held, 'shape', ()))} under it",
        remedy="Choose another name, or delete what is there first if nobody holds its address.",
    )


def parameter_spec(module: nn.Module, name: str) -> TensorSpec:
    """Raises DeclarationError unless ``name`` is a Parameter that can be a source."""
    parameter = module._parameters.get(name)
    if parameter is None:
        raise DeclarationError(
            "a declared source must be a registered Parameter of the module",
            expected="the name of a Parameter",
            found=f"parameters {sorted(n for n, p in module._parameters.items() if p is not None)}",
            remedy="Register it first: module.register_parameter(name, nn.Parameter(..., requires_grad=False)).",
        )
    if (found := other_kind(parameter)) is not None:
        raise DeclarationError(
            "this Parameter has no memory of its own to alias",
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


def in_order(derived: Sequence[Derived]) -> list[Derived]:
    """Derivations with what they derive from before them. Raises DeclarationError on a cycle."""
    by_name = {d.declaration.name: d for d in derived}
    chains = {name: [n for n in d.declaration.sources if n in by_name] for name, d in by_name.items()}
    try:
        return [by_name[name] for name in TopologicalSorter(chains).static_order()]
    except CycleError as error:
        cycle = error.args[1]
        raise DeclarationError(
            "derivations form a cycle",
            name=cycle[0],
            expected="derivations that lead back to checkpoint names",
            found=" -> ".join(reversed(cycle)),
            remedy="Derive one of them from a checkpoint name.",
        ) from None
