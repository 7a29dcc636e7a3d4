"""AliasRegistry: everything one module declared, and the binding of its names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor, nn

from . import _retarget, _shards
from ._declare import Declaration, Derivation
from ._derive import late_derivations, refresh, value_of
from ._names import RegistryNames
from ._parameter import AliasedParameter, loader_attributes
from ._planning import Separate, Source, planned
from ._processes import refuse_for_process
from ._reconcile import reconcile
from ._storage import State, all_locked
from ._take import check_sources, check_tie, share, take
from ._transform import TensorSpec, Transform
from .errors import DeclarationError, StateError

_ATTRIBUTE = "_alias_registry"


class AliasRegistry(RegistryNames):
    """The storages, names, transforms and derivations of one module. Made by :func:`declare`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        #: Names that undeclared code derived and that could not share memory.
        self.separate: dict[str, Separate] = {}
        #: Called with the registry before anything is derived or converted: whatever raises leaves all names as they were.
        self.checks: list[Callable[[AliasRegistry], None]] = []
        #: Called with the registry after anything was converted: for caches that depend on the weights.
        self.on_processed: list[Callable[[AliasRegistry], None]] = []
        #: What ``explain`` says of the module beside its names.
        self.about = ""

    # -- declaring -----------------------------------------------------------------------------------------------------

    def add(self, declarations: Sequence[Declaration], *, loaded: bool, aliasing: bool) -> None:
        """Check all declarations, then carry them out. Nothing changes if any is wrong."""
        check_sources(self, declarations)
        sources, derived = planned(
            self.module, self.label, declarations, set(self.sources) | self.kernel_names(), aliasing=aliasing
        )
        for source in sources:
            check_tie(self.label, source, self.module._parameters[source.name])
        for source in sources:
            self.sources[source.name] = source
            self._allocate(source, loaded)
        self.derived.update({d.declaration.name: d for d in derived})
        self.bind_kernel_names()
        self.mark_stale()

    # -- memory and names ----------------------------------------------------------------------------------------------

    def _allocate(self, source: Source, loaded: bool) -> None:
        """Give a source its storage, with the bytes of the tensor now under its name if they count."""
        tensor = self.module._parameters[source.name]
        if tensor is None:
            raise AssertionError(f"{self.label}.{source.name} vanished while it was being declared")
        if isinstance(tensor, AliasedParameter):
            share(self, source, tensor)
        elif tensor.device.type == "meta":
            source.attributes.update(loader_attributes(tensor))  # a loader will put a real tensor here: see reconcile
        else:
            take(self, source, tensor, State.CHECKPOINT if loaded else State.EMPTY)

    def show_shards(self, name: str, shards: Iterable[tuple[nn.Module, str, Tensor]]) -> None:
        """Show the storage of ``name`` as several names, each a view of it (the q, k and v of a fused projection).

        The fused name itself is taken off its module, so every byte has one checkpoint name and no state dict lists it twice.

        Args:
            name: the declared source.
            shards: (module, parameter name, view), where view is a slice or view of the source parameter.
        """
        _shards.show(self, name, shards)

    def rebind(self) -> None:
        """Put the library's own names back and discard whatever replaced them."""
        for source in self.sources.values():
            self.bind(source)
        self.bind_kernel_names()

    def retarget(self, transforms: Mapping[str, Transform]) -> None:
        """Give sources another kernel format, in place: back by the old inverse, then (on processing) forward by the new.

        Names, addresses and capacities stay; the shape of a kernel name may change. Nothing changes if any format does not fit.

        Raises:
            DeclarationError: not a source with an aliased kernel name, or a transform that does not invert.
            PointerError: the new format needs more memory than was planned (``Alias(room_for=...)``).
        """
        _retarget.retarget(self, transforms)

    def rederive(self, derivations: Iterable[Derivation]) -> None:
        """Give derived names other formulas, in the memory they have; the next processing computes them anew.

        Raises:
            DeclarationError: not a derived name, another shape or dtype, or a source which was never declared. Nothing changes
                then.
        """
        new = list(derivations)
        for derivation in new:
            old = self.derived.get(derivation.name)
            found = None if old is None else (old.declaration.shape, old.declaration.dtype)
            if old is None or old.fallback or found != (derivation.shape, derivation.dtype):
                raise DeclarationError(
                    "only a derivation of the same shape and dtype can be computed otherwise",
                    module=self.label,
                    name=derivation.name,
                    expected=TensorSpec(derivation.shape, derivation.dtype),
                    found=found,
                )
            if unknown := [n for n in derivation.sources if n not in self.sources]:
                raise DeclarationError("derived from names that are no sources here", module=self.label, name=", ".join(unknown))
        for derivation in new:
            self.derived[derivation.name].declaration = derivation
            self.derived[derivation.name].seen = None
        self.mark_stale()

    # -- processing ----------------------------------------------------------------------------------------------------

    def process(self) -> int:
        """Bring every stale derivation and region to kernel format; returns how many were converted or computed.

        Raises:
            StateError: a source was not loaded whole. Nothing is converted then.
            AdoptionError: a foreign tensor under a declared name does not fit.
        """
        with torch.no_grad():
            reconcile(self)
            storages = self.storages()
            with all_locked(storages):
                for storage in storages:
                    storage.settle()
                self._need_loaded()
                for check in self.checks:
                    check(self)
                late = late_derivations(self)
                work = sum(refresh(self, derived) for name, derived in self.derived.items() if name not in late)
                for storage in storages:
                    work += storage.to_kernel()
                work += sum(refresh(self, derived) for name, derived in self.derived.items() if name in late)
        self.settle_guard()
        if work:
            for hook in self.on_processed:
                hook(self)
        return work

    def restore(self) -> None:
        """Bring every storage back to checkpoint format (an engine's ``restore_weights_before_loading``)."""
        with torch.no_grad():
            reconcile(self)
            for storage in self.storages():
                with storage.lock:
                    storage.restore()
        self.mark_stale()
        self.settle_guard()  # where nothing is aliased, nothing is stale

    def _need_loaded(self) -> None:
        for source in self.sources.values():
            if source.storage is None:
                raise StateError(
                    "cannot process a name which is still on the meta device",
                    module=self.label,
                    name=source.name,
                    expected="a loaded tensor",
                    found="a placeholder on meta",
                    remedy="Load the module's weights first.",
                )
            source.storage.need_loaded()

    def value(self, name: str) -> Tensor:
        """What a source (in checkpoint format) or a derivation holds, also of a source that is shown as shards by other names."""
        return value_of(self, name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for storage in self.storages():
            storage.listeners.append(self)


def registry_of(module: nn.Module) -> AliasRegistry | None:
    """The registry of exactly this module, or None."""
    registry: AliasRegistry | None = module.__dict__.get(_ATTRIBUTE)
    return registry


def registries(model: nn.Module) -> list[tuple[str, AliasRegistry]]:
    """(module path, registry) of every declared module in ``model``; labels are refreshed to the paths."""
    found = []
    for path, module in model.named_modules():
        registry = registry_of(module)
        if registry is not None:
            if path:
                registry.relabel(path)
            found.append((path, registry))
    return found


def declare(module: nn.Module, *declarations: Declaration, loaded: bool = True, aliasing: bool = True) -> AliasRegistry:
    """Declare checkpoint names, kernel names and derivations of a module.

    Parameters named as sources become :class:`AliasedParameter`; kernel names become non-persistent buffers. On the meta
    device only the plan is made: memory is bound when :func:`process` finds a tensor under the name, and whatever it finds counts
    as loaded (also the uninitialized memory that ``Module.to_empty()`` makes: load it before processing).

    Args:
        module: the module that owns the Parameters.
        declarations: :class:`Alias`, :class:`Derivation`, :class:`Keep`.
        loaded: whether the Parameters already hold checkpoint values; False for freshly allocated ones.
        aliasing: False gives every kernel name memory of its own (results must be the same; for tests and comparison).

    Returns:
        The module's registry.

    Raises:
        DeclarationError: an unknown source, a name declared twice, a cycle, or a transform that does not invert. The module
            is unchanged then.
        TransformError: the kernel format does not exist for this shape or dtype.
    """
    registry = registry_of(module)
    new = registry is None
    if registry is None:
        registry = AliasRegistry(module)
    registry.add(declarations, loaded=loaded, aliasing=aliasing)
    if new:
        module.__dict__[_ATTRIBUTE] = registry
        module.register_load_state_dict_post_hook(_after_load_state_dict)  # type: ignore[no-untyped-call]
    return registry


def _after_load_state_dict(module: nn.Module, incompatible: Any) -> None:
    # load_state_dict(assign=True) replaces parameters: take them in at once, so that no forward uses old kernel names.
    registry = registry_of(module)
    if registry is not None:
        with torch.no_grad():
            reconcile(registry)


ForkingPickler.register(AliasRegistry, refuse_for_process)
