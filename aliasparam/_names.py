"""The names of one module: what is bound under them, and whether they are current."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._guard import Guard
from ._kernel_name import KernelName
from ._parameter import AliasedParameter, is_same_name
from ._planning import Binding, Derived, Source
from ._storage import AliasedStorage
from ._watch import put, put_buffer, watch
from .errors import AdoptionError


class RegistryNames:
    """The declared names of one module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.label = type(module).__name__
        self.sources: dict[str, Source] = {}
        self.derived: dict[str, Derived] = {}
        self._guard = Guard(self)

    # -- binding -------------------------------------------------------------------------------------------------------

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

    def storages(self) -> list[AliasedStorage]:
        return [s.storage for s in self.sources.values() if s.storage is not None]

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
