"""AliasRegistry: everything one module declared, and the binding of its names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor, nn

from ._declare import Declaration, Derivation
from ._derive import compute
from ._parameter import AliasedParameter, _Aliased, _refuse_for_process, loader_attributes, make_parameter
from ._planning import Binding, Derived, Separate, Source, planned, probe_transform
from ._reconcile import reconcile
from ._storage import AliasedStorage, State, all_locked
from ._take import share, take
from ._transform import TensorSpec, Transform
from ._verdict import StoragePlan, plan_storage
from ._watch import put, watch
from .errors import DeclarationError, PointerError, StaleKernelError, StateError

_ATTRIBUTE = "_alias_registry"


class AliasRegistry:
    """The storages, names, transforms and derivations of one module. Made by :func:`declare`."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.label = type(module).__name__
        self.sources: dict[str, Source] = {}
        self.derived: dict[str, Derived] = {}
        #: Names that undeclared code derived and that could not share memory.
        self.separate: dict[str, Separate] = {}
        #: Called with the registry before anything is derived or converted: whatever raises leaves all names as they were.
        self.checks: list[Callable[[AliasRegistry], None]] = []
        #: Called with the registry after anything was converted: for caches that depend on the weights.
        self.on_processed: list[Callable[[AliasRegistry], None]] = []
        #: What ``explain`` says of the module beside its names.
        self.about = ""
        self._guard: Any = None
        self._suspicious = False

    # -- declaring -----------------------------------------------------------------------------------------------------

    def add(self, declarations: Sequence[Declaration], *, loaded: bool, aliasing: bool) -> None:
        """Check all declarations, then carry them out. Nothing changes if any is wrong."""
        sources, derived = planned(
            self.module, self.label, declarations, set(self.sources) | self.kernel_names(), aliasing=aliasing
        )
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
        if isinstance(tensor, _Aliased):
            share(self, source, tensor)
        elif tensor.device.type == "meta":
            source.attributes.update(loader_attributes(tensor))  # a loader will put a real tensor here: see reconcile
        else:
            take(self, source, tensor, State.CHECKPOINT if loaded else State.EMPTY)

    def own(self, source: Source, storage: AliasedStorage, parameter: AliasedParameter) -> None:
        """Make ``parameter`` over ``storage`` the checkpoint name of ``source``."""
        source.storage = storage
        storage.listeners.append(self.mark_stale)
        source.bindings = [Binding(self.module, source.name, parameter)]
        self.bind(source)

    def bind(self, source: Source) -> None:
        for binding in source.bindings:
            watch(binding.module, binding.name, self)
            put(binding.module, binding.name, binding.parameter)

    def bind_kernel_names(self) -> None:
        for source in self.sources.values():
            if source.derived and source.storage is not None and source.storage.kernel is not None:
                self._bind_buffer(source.derived, source.storage.kernel)
        for derived in self.derived.values():
            if derived.tensor is None and (device := self.device()) is not None:
                spec = derived.declaration
                derived.tensor = torch.empty(spec.shape, dtype=spec.dtype, device=device)
            if derived.tensor is not None:
                self._bind_buffer(derived.declaration.name, derived.tensor)

    def _bind_buffer(self, name: str, tensor: Tensor) -> None:
        module = self.module
        if module._buffers.get(name) is tensor:
            return
        module._parameters.pop(name, None)
        module.__dict__.pop(name, None)
        module._buffers[name] = tensor
        module._non_persistent_buffers_set.add(name)

    def device(self) -> torch.device | None:
        for source in self.sources.values():
            if source.storage is not None:
                return source.storage.buffer.device
        return None

    def kernel_names(self) -> set[str]:
        return {s.derived for s in self.sources.values() if s.derived} | set(self.derived)

    def show_shards(self, name: str, shards: Iterable[tuple[nn.Module, str, Tensor]]) -> None:
        """Show the storage of ``name`` as several names, each a view of it (the q, k and v of a fused projection).

        The fused name itself is taken off its module, so every byte has one checkpoint name and no state dict lists it twice.

        Args:
            name: the declared source.
            shards: (module, parameter name, view), where view is a slice or view of the source parameter.
        """
        source = self.sources[name]
        if source.storage is None:
            raise StateError("a source on the meta device has no memory to show", module=self.label, name=name)
        bindings = []
        for module, shard_name, view in shards:
            if not isinstance(view, _Aliased) or view._alias_storage is not source.storage:
                raise DeclarationError("a shard must be a view of the source it shows", module=self.label, name=name)
            old = module._parameters.get(shard_name)
            parameter = make_parameter(source.storage, view._alias_memory, type(old) if old is not None else nn.Parameter)
            if old is not None:
                parameter.__dict__.update(loader_attributes(old))
            bindings.append(Binding(module, shard_name, parameter))
        if sum(b.parameter.numel() for b in bindings) != source.plan.source.numel:
            raise DeclarationError(
                "the shards must cover the source exactly once",
                module=self.label,
                name=name,
                expected=f"{source.plan.source.numel} elements",
                found=f"{sum(b.parameter.numel() for b in bindings)} elements",
            )
        self.module._parameters.pop(name, None)
        source.bindings = bindings
        self.bind(source)

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
        plans = {name: self._plan_for(name, transform) for name, transform in transforms.items()}
        with torch.no_grad():
            reconcile(self)
            for name, plan in plans.items():
                source = self.sources[name]
                if source.storage is not None:
                    with source.storage.lock:
                        source.storage.retarget(plan)
                source.plan = plan
            self.bind_kernel_names()
        self.mark_stale()

    def _plan_for(self, name: str, transform: Transform) -> StoragePlan:
        source = self.sources.get(name)
        if source is None or not source.derived:
            raise DeclarationError(
                "only a source with an aliased kernel name has a format to change",
                module=self.label,
                name=name,
                found=f"aliased sources {sorted(n for n, s in self.sources.items() if s.derived)}",
            )
        if source.storage is not None and len(source.storage.listeners) > 1:
            raise DeclarationError(
                "another module declares this tied weight too, to the format it has",
                module=self.label,
                name=name,
                remedy="Untie it with clone() before declaring, or declare it once.",
            )
        old, plan = source.plan, plan_storage(source.plan.source, transform)
        if not plan.reason.aliases or plan.regions != old.regions or plan.region_capacity > old.region_capacity:
            raise PointerError(
                f"this kernel format does not fit the storage: {plan.reason.value}",
                module=self.label,
                name=name,
                expected=f"{old.regions} regions of at most {old.region_capacity} bytes",
                found=f"{plan.regions} regions of {plan.region_capacity} bytes ({plan.derived})",
                remedy="Plan room for it at creation: Alias(room_for=(transform,)).",
            )
        probe_transform(self.label, name, transform, plan.source)
        return replace(plan, region_capacity=old.region_capacity)

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
            storages = self._storages()
            with all_locked(storages):
                for storage in storages:
                    storage.settle()
                self._need_loaded()
                for check in self.checks:
                    check(self)
                late = self._late_derivations()
                work = sum(self._refresh(derived) for name, derived in self.derived.items() if name not in late)
                for storage in storages:
                    work += storage.to_kernel()
                work += sum(self._refresh(derived) for name, derived in self.derived.items() if name in late)
        self.settle_guard()
        if work:
            for hook in self.on_processed:
                hook(self)
        return work

    def restore(self) -> None:
        """Bring every storage back to checkpoint format (an engine's ``restore_weights_before_loading``)."""
        with torch.no_grad():
            reconcile(self)
            for storage in self._storages():
                with storage.lock:
                    storage.restore()
        self.mark_stale()
        self.settle_guard()  # where nothing is aliased, nothing is stale

    def _storages(self) -> list[AliasedStorage]:
        return [s.storage for s in self.sources.values() if s.storage is not None]

    def _need_loaded(self) -> None:
        for source in self.sources.values():
            if source.storage is None:
                raise StateError(
                    "cannot process a name which is still on the meta device",
                    module=self.label,
                    name=source.name,
                    remedy="Load the module's weights first.",
                )
            source.storage.need_loaded()

    def _refresh(self, derived: Derived) -> int:
        current = tuple(self._generation(name) for name in derived.declaration.sources)
        if derived.seen == current:
            return 0
        spec = derived.declaration
        value = compute(self.label, derived, [self.value(name) for name in spec.sources])
        if derived.tensor is None or TensorSpec.of(value) != TensorSpec(spec.shape, spec.dtype):
            raise StateError(
                "a derivation returned another shape or dtype than it declared",
                module=self.label,
                name=spec.name,
                expected=TensorSpec(spec.shape, spec.dtype),
                found=TensorSpec.of(value),
                remedy="Return exactly that from the function, or declare what it returns.",
            )
        derived.tensor.copy_(value)
        derived.seen = current
        derived.generation += 1
        return 1

    def _generation(self, name: str) -> int:
        if name in self.derived:
            return self.derived[name].generation
        storage = self._source_of(name).storage
        return storage.generation if storage is not None else -1

    def value(self, name: str) -> Tensor:
        """What a source (in checkpoint format) or a derivation holds, also of a source that is shown as shards by other names."""
        if name in self.derived:
            tensor = self.derived[name].tensor
            if tensor is None:
                raise AssertionError(f"{self.label}.{name}: derived before it has memory")
            return tensor
        storage = self._source_of(name).storage
        if storage is None:
            raise AssertionError(f"{self.label}.{name}: read before it has memory")
        if name not in self.sources and storage.kernel is not None:
            return storage.kernel
        return storage.read(storage.checkpoint)

    def _source_of(self, name: str) -> Source:
        """The source of a checkpoint name, or of the kernel name that lives in its storage."""
        return self.sources.get(name) or next(s for s in self.sources.values() if s.derived == name)

    def _late_derivations(self) -> set[str]:
        """Derivations of kernel names, and what derives from them: computed after the conversion, the others before it."""
        late = {s.derived for s in self.sources.values() if s.derived}
        for name, derived in self.derived.items():  # in the order of refreshing
            if late.intersection(derived.declaration.sources):
                late.add(name)
        return {name for name in self.derived if name in late}

    # -- staleness -----------------------------------------------------------------------------------------------------

    def mark_stale(self) -> None:
        """A checkpoint name changed: refuse the module's forward until it is processed (law 8).

        The guard is a forward pre-hook which exists only while something is stale, so a ready module pays nothing.
        """
        if self._guard is None and self.kernel_names():
            self._guard = self.module.register_forward_pre_hook(self._check_before_forward, prepend=True)

    def suspect(self) -> None:
        """Something was put under a declared name. Whether it stays there is seen at the next forward or verb."""
        self._suspicious = True
        self.mark_stale()

    def replaced_names(self) -> list[str]:
        """Declared names under which there is another tensor than ours."""
        bindings = [b for source in self.sources.values() for b in source.bindings]
        found = ((b, b.module._parameters.get(b.name)) for b in bindings)
        return [b.name for b, tensor in found if tensor is not None and tensor is not b.parameter]

    def settle_guard(self) -> None:
        """Let the module run again once every kernel name is current."""
        if self._suspicious and not self.replaced_names():
            self._suspicious = False
        if self._guard is not None and not self._suspicious and not self.stale_names():
            self._guard.remove()
            self._guard = None

    @property
    def is_ready(self) -> bool:
        """Whether every kernel name is current."""
        if self._suspicious:
            self.settle_guard()
        return self._guard is None

    def stale_names(self) -> list[str]:
        """Kernel names older than their sources."""
        stale = [
            s.derived for s in self.sources.values() if s.derived and (s.storage is None or s.storage.state is not State.KERNEL)
        ]
        older: list[str] = []
        for name, derived in self.derived.items():
            sources = derived.declaration.sources
            if derived.seen != tuple(self._generation(n) for n in sources) or not set(older).isdisjoint(sources):
                older.append(name)
        return stale + older

    def _check_before_forward(self, module: nn.Module, args: Any) -> None:
        self.settle_guard()  # what was stale may have been processed by another module that shows the same storage
        if self._guard is None:
            return
        replaced = self.replaced_names()
        raise StaleKernelError(
            "called while a declared name holds a tensor that was not taken in yet"
            if replaced
            else "called while kernel-format names are stale",
            module=self.label,
            name=", ".join(replaced or self.stale_names()) or None,
            expected="names processed since the last write to their sources",
            remedy="Call aliasparam.process(model) after loading.",
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for storage in self._storages():
            storage.listeners.append(self.mark_stale)


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
                registry.label = path
                for source in registry.sources.values():
                    if source.storage is not None:
                        source.storage.label = f"{path}.{source.name}"
            found.append((path, registry))
    return found


def declare(module: nn.Module, *declarations: Declaration, loaded: bool = True, aliasing: bool = True) -> AliasRegistry:
    """Declare checkpoint names, kernel names and derivations of a module.

    Parameters named as sources become :class:`AliasedParameter`; kernel names become non-persistent buffers. On the meta
    device only the plan is made: memory is bound when :func:`process` finds a loaded tensor under the name.

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


ForkingPickler.register(AliasRegistry, _refuse_for_process)
