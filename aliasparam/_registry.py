"""AliasRegistry: everything one module declared, and the binding of its names.

[Note: who is right] The registry's storages are the truth. Engines replace Parameters by ``setattr``, move and re-create
them while loading; so before every verb the registry *reconciles*: a foreign tensor under a declared name is adopted (its
bytes go into the storage, its loader attributes onto our parameter) or refused, and kernel names are bound again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ._declare import Alias, Declaration, Derivation, Keep
from ._parameter import AliasedParameter, AliasedView, _Aliased, make_parameter
from ._storage import AliasedStorage, State
from ._transform import Identity, TensorSpec, check_inverse
from ._verdict import StoragePlan, plan_storage
from .errors import AdoptionError, DeclarationError, StaleKernelError, StateError

_ATTRIBUTE = "_alias_registry"


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
    tensor: Tensor | None = None
    seen: tuple[int, ...] | None = None  # generations of its sources when it was computed
    generation: int = 0


class AliasRegistry:
    """The storages, names, transforms and derivations of one module. Made by :func:`declare`."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.label = type(module).__name__
        self.sources: dict[str, Source] = {}
        self.derived: dict[str, Derived] = {}
        self._guard: Any = None

    # -- declaring -----------------------------------------------------------------------------------------------------

    def add(self, declarations: Sequence[Declaration], *, loaded: bool, aliasing: bool) -> None:
        """Check all declarations, then carry them out. Nothing changes if any is wrong."""
        sources, derived = self._planned(declarations, aliasing)
        for source in sources:
            self.sources[source.name] = source
            self._allocate(source, loaded)
        self.derived.update({d.declaration.name: d for d in derived})
        self._bind_kernel_names()
        self.mark_stale()

    def _planned(self, declarations: Sequence[Declaration], aliasing: bool) -> tuple[list[Source], list[Derived]]:
        sources: dict[str, Source] = {}
        derived: list[Derived] = []
        taken = set(self.sources) | self.kernel_names()
        wanted = [d for d in declarations if isinstance(d, Alias)]
        wanted += [Alias(d.source, "") for d in declarations if isinstance(d, Keep)]
        for alias in wanted:
            self._need_free(taken, alias.source, alias.derived)
            spec = self._parameter_spec(alias.source)
            plan = plan_storage(spec, alias.transform, aliasing=aliasing)
            if alias.transform.invertible and not alias.transform.is_identity_for(spec):
                self._probe(alias, spec)
            fell_back = bool(alias.derived) and not plan.reason.aliases
            if fell_back:
                self._report_fallback(alias, plan, aliasing)
                derived.append(Derived(_copy_derivation(alias, plan), fallback=plan))
                plan_here = plan_storage(spec, Identity())
            else:
                plan_here = plan
            sources[alias.source] = Source(alias.source, plan_here, None if fell_back else alias.derived or None)
        derivations = [d for d in declarations if isinstance(d, Derivation)]
        self._need_free(taken, *(d.name for d in derivations))
        for derivation in derivations:
            derived.append(Derived(derivation))
            for name in derivation.sources:
                if name not in sources and name not in taken:
                    taken.add(name)
                    sources[name] = Source(name, plan_storage(self._parameter_spec(name), Identity()), None)
        return list(sources.values()), _in_order(derived, self.label)

    def _need_free(self, taken: set[str], *names: str) -> None:
        for name in filter(None, names):
            if name in taken:
                raise DeclarationError(
                    "this name is declared twice",
                    module=self.label,
                    name=name,
                    expected="each source and each derived name in one declaration",
                    remedy="Chain transforms with .then(), or derive from the derived name.",
                )
            taken.add(name)

    def _parameter_spec(self, name: str) -> TensorSpec:
        parameter = self.module._parameters.get(name)
        if parameter is None:
            raise DeclarationError(
                "a declared source must be a registered Parameter of the module",
                module=self.label,
                name=name,
                found=f"parameters {sorted(n for n, p in self.module._parameters.items() if p is not None)}",
                remedy="Register it first: module.register_parameter(name, nn.Parameter(..., requires_grad=False)).",
            )
        if parameter.layout is not torch.strided:
            raise DeclarationError("only strided tensors can be aliased", module=self.label, name=name, found=parameter.layout)
        return TensorSpec.of(parameter)

    def _probe(self, alias: Alias, spec: TensorSpec) -> None:
        """Check the inverse on one region of the declared shape (two where there are more)."""
        lead = max(len(spec.shape) - alias.transform.core_dims, 0)
        probe = TensorSpec(
            (*(min(n, 2) if i == 0 else 1 for i, n in enumerate(spec.shape[:lead])), *spec.shape[lead:]),
            spec.dtype,
        )
        key = (alias.transform, probe)
        if key in _probed:
            return
        try:
            check_inverse(alias.transform, probe)
        except DeclarationError:
            raise
        except Exception as error:
            raise DeclarationError(
                f"the transform of {alias.derived!r} failed on a probe of {probe}: {error}",
                module=self.label,
                name=alias.source,
            ) from error
        _probed.add(key)

    def _report_fallback(self, alias: Alias, plan: StoragePlan, aliasing: bool) -> None:
        if not aliasing or alias.on_mismatch == "copy":
            return
        error = DeclarationError(
            f"{alias.derived!r} cannot share memory with its source: {plan.reason.value}",
            module=self.label,
            name=alias.source,
            expected=f"the bytes of {plan.source}",
            found=plan.derived,
            remedy='Pass on_mismatch="copy" to give it memory of its own.',
        )
        if alias.on_mismatch == "error":
            raise error
        warnings.warn(str(error), stacklevel=5)

    # -- memory and names ----------------------------------------------------------------------------------------------

    def _allocate(self, source: Source, loaded: bool) -> None:
        """Give a source its storage, with the bytes of the tensor now under its name if they count."""
        tensor = self.module._parameters[source.name]
        if tensor is None:
            raise AssertionError(f"{self.label}.{source.name} vanished while it was being declared")
        source.attributes.update(_loader_attributes(tensor))
        if tensor.device.type == "meta":
            return  # a loader will put a real tensor here: see reconcile
        with torch.no_grad():
            source.storage = self._storage_from(source, tensor.detach(), State.CHECKPOINT if loaded else State.EMPTY)
        parameter = make_parameter(source.storage, source.storage.checkpoint)
        parameter.__dict__.update(source.attributes)
        source.bindings = [Binding(self.module, source.name, parameter)]
        self._bind(source)

    def _storage_from(self, source: Source, tensor: Tensor, state: State) -> AliasedStorage:
        plan, label = source.plan, f"{self.label}.{source.name}"
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == plan.nbytes == plan.source.nbytes
        if whole and type(tensor) is Tensor:
            # The tensor's own allocation is exactly the capacity: take it over, no copy and no new address.
            buffer = tensor.reshape(-1).view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)
            storage = AliasedStorage(label, plan, buffer, state, has_kernel_name=bool(source.derived))
        else:
            buffer = torch.empty(plan.nbytes, dtype=torch.uint8, device=tensor.device)
            storage = AliasedStorage(label, plan, buffer, state, has_kernel_name=bool(source.derived))
            if state is State.CHECKPOINT:
                storage.checkpoint.copy_(tensor)
        storage.on_stale = self.mark_stale
        return storage

    def _bind(self, source: Source) -> None:
        for binding in source.bindings:
            binding.module._parameters[binding.name] = binding.parameter

    def _bind_kernel_names(self) -> None:
        for source in self.sources.values():
            if source.derived and source.storage is not None and source.storage.kernel is not None:
                self._bind_buffer(source.derived, source.storage.kernel)
        for derived in self.derived.values():
            if derived.tensor is None and (device := self._device()) is not None:
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

    def _device(self) -> torch.device | None:
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
            parameter = make_parameter(source.storage, view._alias_memory)
            old = module._parameters.get(shard_name)
            if old is not None:
                parameter.__dict__.update(_loader_attributes(old))
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
        self._bind(source)

    # -- reconciling: see [Note: who is right] --------------------------------------------------------------------------

    def reconcile(self) -> None:
        """Adopt or refuse whatever was put under the declared names since the last verb."""
        foreign: list[tuple[Source, Binding, Tensor]] = [
            (source, binding, tensor)
            for source in self.sources.values()
            for binding in (source.bindings or [Binding(self.module, source.name, None)])  # type: ignore[arg-type]
            if (tensor := binding.module._parameters.get(binding.name)) is not binding.parameter and tensor is not None
        ]
        for source, binding, found in foreign:
            self._check_adoptable(source, binding, found)
        self._follow_device(foreign)
        for source, binding, found in foreign:
            self._adopt(source, binding, found)
        self._drop_left_behind()
        for source in self.sources.values():
            self._bind(source)
        self._bind_kernel_names()

    def _drop_left_behind(self) -> None:
        """Derived tensors whose sources moved to another device are computed anew there."""
        here = self._device()
        for derived in self.derived.values():
            if derived.tensor is not None and derived.tensor.device != here:
                derived.tensor, derived.seen = None, None

    def _check_adoptable(self, source: Source, binding: Binding, tensor: Tensor) -> None:
        expected = source.plan.source if source.storage is None else TensorSpec.of(binding.parameter._alias_memory)
        if TensorSpec.of(tensor) != expected:
            raise AdoptionError(
                "a tensor that does not fit was put in the place of a declared name",
                module=self.label,
                name=binding.name,
                expected=expected,
                found=TensorSpec.of(tensor),
                remedy="Declared weights keep shape and dtype (Module.half() and the like cannot apply to them). "
                "registry.rebind() puts the library's parameter back.",
            )

    def _follow_device(self, foreign: list[tuple[Source, Binding, Tensor]]) -> None:
        """After Module.to(device) every name holds a tensor elsewhere: follow, as a whole."""
        here = self._device()
        devices = {t.device for _, _, t in foreign if t.device.type != "meta"}
        if here is None or devices <= {here}:
            return
        count = sum(len(s.bindings) for s in self.sources.values())
        if len(devices) != 1 or len(foreign) != count:
            raise AdoptionError(
                "only some of the declared names are on another device",
                module=self.label,
                expected=f"all {count} names on {here}, or all elsewhere",
                found=f"{len(foreign)} names on {sorted(map(str, devices))}",
                remedy="Move the whole module: module.to(device).",
            )
        device = devices.pop()
        for source in self.sources.values():
            if source.storage is None:
                raise AssertionError(f"{self.label}.{source.name}: bound without storage")
            source.storage.relocate(device)
            for binding in source.bindings:
                old = binding.parameter
                memory = old._alias_memory
                typed = source.storage.buffer.view(memory.dtype)
                view = typed.as_strided(memory.shape, memory.stride(), memory.storage_offset())
                binding.parameter = make_parameter(source.storage, view)
                binding.parameter.__dict__.update(_loader_attributes(old))

    def _adopt(self, source: Source, binding: Binding, tensor: Tensor) -> None:
        if tensor.device.type == "meta":
            return  # a placeholder: nothing to take, and our name comes back
        if source.storage is None:
            self._materialize(source, tensor)
            return
        binding.parameter.__dict__.update(_loader_attributes(tensor))
        same_memory = isinstance(tensor, _Aliased) and tensor._alias_storage is source.storage
        if not same_memory:
            binding.parameter.copy_(tensor.detach())

    def _materialize(self, source: Source, tensor: Tensor) -> None:
        source.attributes.update(_loader_attributes(tensor))
        with torch.no_grad():
            source.storage = self._storage_from(source, tensor.detach(), State.CHECKPOINT)
        parameter = make_parameter(source.storage, source.storage.checkpoint)
        parameter.__dict__.update(source.attributes)
        source.bindings = [Binding(self.module, source.name, parameter)]

    def rebind(self) -> None:
        """Put the library's own names back and discard whatever replaced them."""
        for source in self.sources.values():
            self._bind(source)
        self._bind_kernel_names()

    # -- processing ----------------------------------------------------------------------------------------------------

    def process(self) -> int:
        """Bring every stale derivation and region to kernel format; returns how many were converted or computed.

        Raises:
            StateError: a source was not loaded whole. Nothing is converted then.
            AdoptionError: a foreign tensor under a declared name does not fit.
        """
        with torch.no_grad():
            self.reconcile()
            storages = self._storages()
            for storage in storages:
                storage.settle()
            self._need_loaded()
            work = sum(self._refresh(derived) for derived in self.derived.values())
            for storage in storages:
                work += storage.to_kernel()
        self.settle_guard()
        return work

    def restore(self) -> None:
        """Bring every storage back to checkpoint format (an engine's ``restore_weights_before_loading``)."""
        with torch.no_grad():
            self.reconcile()
            for storage in self._storages():
                storage.restore()
        self.mark_stale()

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
        value = spec.function(*(self._value(name) for name in spec.sources))
        if derived.tensor is None or TensorSpec.of(value) != TensorSpec(spec.shape, spec.dtype):
            raise StateError(
                "a derivation returned another shape or dtype than it declared",
                module=self.label,
                name=spec.name,
                expected=TensorSpec(spec.shape, spec.dtype),
                found=TensorSpec.of(value),
            )
        derived.tensor.copy_(value)
        derived.seen = current
        derived.generation += 1
        return 1

    def _generation(self, name: str) -> int:
        if name in self.derived:
            return self.derived[name].generation
        storage = self.sources[name].storage
        return storage.generation if storage is not None else -1

    def _value(self, name: str) -> Tensor:
        if name in self.derived:
            tensor = self.derived[name].tensor
            if tensor is None:
                raise AssertionError(f"{self.label}.{name}: derived before it has memory")
            return tensor
        storage = self.sources[name].storage
        if storage is None:
            raise AssertionError(f"{self.label}.{name}: read before it has memory")
        return storage.read(storage.checkpoint)

    # -- staleness -----------------------------------------------------------------------------------------------------

    def mark_stale(self) -> None:
        """A checkpoint name changed: refuse the module's forward until it is processed (law 8).

        The guard is a forward pre-hook which exists only while something is stale, so a ready module pays nothing.
        """
        if self._guard is None and self.kernel_names():
            self._guard = self.module.register_forward_pre_hook(self._refuse_forward, prepend=True)

    def settle_guard(self) -> None:
        """Let the module run again once every kernel name is current."""
        if self._guard is not None and not self.stale_names():
            self._guard.remove()
            self._guard = None

    @property
    def is_ready(self) -> bool:
        """Whether every kernel name is current."""
        return self._guard is None

    def stale_names(self) -> list[str]:
        """Kernel names older than their sources."""
        stale = [
            s.derived for s in self.sources.values() if s.derived and (s.storage is None or s.storage.state is not State.KERNEL)
        ]
        for name, derived in self.derived.items():
            if derived.seen != tuple(self._generation(n) for n in derived.declaration.sources):
                stale.append(name)
        return stale

    def _refuse_forward(self, module: nn.Module, args: Any) -> None:
        raise StaleKernelError(
            "called while kernel-format names are stale",
            module=self.label,
            name=", ".join(self.stale_names()) or None,
            expected="names processed since the last write to their sources",
            remedy="Call aliasparam.process(model) after loading.",
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for storage in self._storages():
            storage.on_stale = self.mark_stale


_probed: set[tuple[Any, TensorSpec]] = set()


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
            registry.reconcile()


def _loader_attributes(tensor: Tensor) -> dict[str, Any]:
    """What engines hang on parameters (weight_loader, output_dim, ...)."""
    return {k: v for k, v in tensor.__dict__.items() if k not in ("_alias_storage", "_alias_memory", "_is_param")}


def _copy_derivation(alias: Alias, plan: StoragePlan) -> Derivation:
    return Derivation(alias.derived, (alias.source,), alias.transform.forward, plan.derived.shape, plan.derived.dtype)


def _in_order(derived: list[Derived], label: str) -> list[Derived]:
    """Derivations with what they derive from before them. Raises DeclarationError on a cycle."""
    by_name = {d.declaration.name: d for d in derived}
    ordered: list[Derived] = []
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            raise DeclarationError("derivations form a cycle", module=label, name=" -> ".join((*trail, name)))
        if name in done or name not in by_name:
            return
        for source in by_name[name].declaration.sources:
            visit(source, (*trail, name))
        done.add(name)
        ordered.append(by_name[name])

    for name in by_name:
        visit(name, ())
    return ordered


__all__ = ["AliasRegistry", "AliasedView", "declare", "registries", "registry_of"]
