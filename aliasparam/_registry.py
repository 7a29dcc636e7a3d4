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
from ._guard import Guard
from ._kernel_name import KernelName
from ._parameter import AliasedParameter, is_same_name, loader_attributes
from ._planning import Binding, Derived, Separate, Source, planned
from ._processes import refuse_for_process
from ._reconcile import reconcile
from ._storage import AliasedStorage, State, all_locked
from ._take import check_sources, check_tie, share, take
from ._transform import TensorSpec, Transform
from ._watch import put, put_buffer, watch
from .errors import AdoptionError, DeclarationError, StateError

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
        self._guard = Guard(self)

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

    def own(self, source: Source, storage: AliasedStorage, parameter: AliasedParameter) -> None:
        """Make ``parameter`` over ``storage`` the checkpoint name of ``source``."""
        source.storage = storage
        storage.listeners.append(self)
        if storage.kernel_name is not None and source.derived:
            storage.kernel_name.label = f"{self.label}.{source.derived}"
        source.bindings = [Binding(self.module, source.name, parameter)]
        self.bind(source)

    def bind(self, source: Source) -> None:
        for binding in source.bindings:
            watch(binding.module, binding.name, self)
            put(binding.module, binding.name, binding.parameter)

    def bind_kernel_names(self) -> None:
        """Show every kernel name on the module: its tensor, or what stands in for it while the module is stale."""
        device = self.device()
        for derived in self.derived.values():
            if derived.kernel is None and device is not None:
                spec = derived.declaration
                with torch.inference_mode(False):
                    memory = torch.empty(spec.shape, dtype=spec.dtype, device=device)
                derived.kernel = KernelName(f"{self.label}.{spec.name}", memory)
        for name, kernel in self.kernels():
            put_buffer(self.module, name, self._shown(kernel), self)

    def show_kernel_names(self) -> None:
        """As :meth:`bind_kernel_names`, but leave what was put under a name for the next verb to see."""
        for name, kernel in self.kernels():
            if kernel.shows(self.module._buffers.get(name)):
                put_buffer(self.module, name, self._shown(kernel), self)

    def _shown(self, kernel: KernelName) -> Tensor:
        return kernel.stand_in if self._guard.is_up else kernel.tensor

    def kernels(self) -> list[tuple[str, KernelName]]:
        """Every kernel name that has memory."""
        sources, derived = self.sources.values(), self.derived.values()
        found = [(s.derived, s.storage.kernel_name) for s in sources if s.derived and s.storage is not None]
        found += [(d.declaration.name, d.kernel) for d in derived]
        return [(name, kernel) for name, kernel in found if kernel is not None]

    def device(self) -> torch.device | None:
        for source in self.sources.values():
            if source.storage is not None:
                return source.storage.buffer.device
        return None

    def kernel_names(self) -> set[str]:
        return {s.derived for s in self.sources.values() if s.derived} | set(self.derived)

    def relabel(self, path: str) -> None:
        """Call everything by the module's place in its model."""
        self.label = path
        for source in self.sources.values():
            if source.storage is not None:
                source.storage.label = f"{path}.{source.name}"
        for name, kernel in self.kernels():
            kernel.label = f"{path}.{name}"

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

    def storages(self) -> list[AliasedStorage]:
        return [s.storage for s in self.sources.values() if s.storage is not None]

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

    # -- staleness -----------------------------------------------------------------------------------------------------

    def mark_stale(self) -> None:
        """A checkpoint name changed: refuse the module's forward and its kernel names until it is processed (law 8)."""
        self._guard.mark_stale()

    def suspect(self) -> None:
        """Something was put under a declared name. Whether it stays there is seen at the next forward or verb."""
        self._guard.suspect()

    def look_again(self) -> None:
        """Something of ours was put back under a declared name."""
        self._guard.look_again()

    def settle_guard(self) -> None:
        """Let the module run again once every kernel name is current."""
        self._guard.settle()

    @property
    def is_ready(self) -> bool:
        """Whether every kernel name is current."""
        self._guard.look_again()
        return not self._guard.is_up

    def shows(self, name: str, value: Any) -> bool:
        """Whether ``value`` is what this registry has under ``name``, a checkpoint name or a kernel name."""
        return any(k.shows(value) for n, k in self.kernels() if n == name) or any(
            is_same_name(value, b.parameter) for s in self.sources.values() for b in s.bindings if b.name == name
        )

    def check_kernel_name(self, name: str, value: Any) -> None:
        """Raise AdoptionError where ``value`` is put under a kernel name that it cannot stand for even in passing."""
        kernel = dict(self.kernels()).get(name)
        if kernel is None or not isinstance(value, Tensor):
            return
        found, expected = (value.dtype, value.shape), (kernel.memory.dtype, kernel.memory.shape)
        if found != expected:
            raise AdoptionError(
                "a kernel-format name was given another dtype or shape",
                module=self.label,
                name=name,
                expected=f"{expected[0]} {list(expected[1])}",
                found=f"{found[0]} {list(found[1])}",
                remedy="Module.half() and the like cannot apply to declared modules; cast the others.",
            )

    def replaced_names(self) -> list[str]:
        """Declared names under which there is another tensor than ours."""
        bindings = [b for source in self.sources.values() for b in source.bindings]
        found = ((b, b.module._parameters.get(b.name)) for b in bindings)
        replaced = [b.name for b, tensor in found if tensor is not None and not is_same_name(tensor, b.parameter)]
        return replaced + [n for n, kernel in self.kernels() if not kernel.shows(self.module._buffers.get(n))]

    def stale_names(self) -> list[str]:
        """Kernel names older than their sources, or written or moved by other code."""
        stale = [s.derived for s in self.sources.values() if s.derived and (s.storage is None or not s.storage.is_current)]
        older: list[str] = []
        for name, derived in self.derived.items():
            if not self.is_current(derived) or not set(older).isdisjoint(derived.declaration.sources):
                older.append(name)
        return stale + older

    def is_current(self, derived: Derived) -> bool:
        kernel = derived.kernel
        if kernel is None or kernel.was_written or kernel.was_moved:
            return False
        return derived.seen == tuple(self.generation_of(n) for n in derived.declaration.sources)

    def generation_of(self, name: str) -> int:
        """Counts the changes of a name that something derives from."""
        if name in self.derived:
            return self.derived[name].generation
        storage = self.source_of(name).storage
        return storage.generation if storage is not None else -1

    def source_of(self, name: str) -> Source:
        """The source of a checkpoint name, or of the kernel name that lives in its storage."""
        return self.sources.get(name) or next(s for s in self.sources.values() if s.derived == name)

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


ForkingPickler.register(AliasRegistry, refuse_for_process)
