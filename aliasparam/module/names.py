"""The names of one module: what is bound under them, and whether the module is ready."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StaleKernelError
from ..storage.kernel_name import KernelName
from ..storage.locks import all_locked
from ..storage.storage import AliasedStorage
from ..tensors.parameter import AliasedParameter, is_same_name
from ..torch_private import outside_inference
from .containers import Slot, all_stand, put, standing, ways_below
from .planning import Binding, Derived, Source


class Readiness(Enum):
    """Whether a module may run. CLOSED: a reload is about to write, and waits for forwards that began before. OPENING: on the way
    from one to the other, so that an interrupt between is none of both."""

    READY = "ready"
    CLOSED = "closed"
    OPENING = "opening"
    OPEN = "open"


#: For every write, processing and forward: Python 3.11 looks a member of an Enum up by its name each time.
READY, OPEN = Readiness.READY, Readiness.OPEN


class ModuleNames:
    """The declared names of one module.

    [Note: open] From the first write after a commit until the next commit the module is *open*: its forward and its kernel names
    refuse. Storages tell before bytes change, under their lock; a commit looks at versions under the locks of all of them.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.label = type(module).__name__
        self.sources: dict[str, Source] = {}
        self.derived: dict[str, Derived] = {}
        self.owners: dict[str, Source | Derived] = {}  # of all of these, by the kernel name that they have; see bind()
        #: What ``explain`` says of the module beside its names.
        self.about = ""
        #: What stands where, and every kernel name's tensor, version and address, once all was seen to be ours.
        self._shown: tuple[list[Slot], list[tuple[Tensor, int, int]]] | None = None
        self._reached: list[Slot] | None = None  # and modules below that show shards, where none has left
        self.readiness = READY
        #: The reload that has this module, alive while it is open: nothing else may let the module run.
        self.holder: weakref.ref[Any] | None = None
        self._committed: dict[str, int] = {}  # versions of the sources which the kernel names are of

    # -- names ---------------------------------------------------------------------------------------------------------

    def bind_storage(self, source: Source, storage: AliasedStorage, parameter: AliasedParameter) -> None:
        """Make ``parameter`` over ``storage`` the checkpoint name of ``source``: at once, else an interrupt leaves one alone."""
        storage.listen(self)
        if storage.kernel_name is not None and source.derived:
            storage.kernel_name.label = f"{self.label}.{source.derived}"
        source.storage, source.bindings = storage, [Binding(self.module, source.name, parameter)]

    def bind(self, sources: Iterable[Source] = ()) -> None:
        """Show the checkpoint names of ``sources``; and every kernel name: its tensor, or while the module is open its twin."""
        aliased = {source.derived: source for source in self.sources.values() if source.derived}
        self.owners, device = aliased | self.derived, self.device()
        for name, derived in self.derived.items():  # made where its sources are, and goes where they go
            old = derived.kernel
            if device is not None and (old is None or device not in (old.memory.device, derived.home)):
                spec, kept = derived.declaration.spec, old is not None and not (old.was_written or old.memory.is_meta)
                with outside_inference():
                    memory = torch.zeros(spec.shape, dtype=spec.dtype, device=device)
                    memory = memory.copy_(old.memory) if old is not None and kept else memory
                derived.kernel, derived.seen = KernelName(f"{self.label}.{name}", memory), derived.seen if kept else None
                derived.home = device
        self._shown = self._reached = None
        for source in sources:
            for binding in source.bindings:
                put(binding.module, binding.name, binding.parameter, self)
        for name, kernel in self.kernels():
            if kernel.was_moved:
                kernel.put_back()
            put(self.module, name, kernel.tensor if self.readiness is READY else kernel.refusing, self)
        self.left()

    def rebind(self) -> None:
        """Put the library's own names back and discard whatever replaced them."""
        self.bind(self.sources.values())

    def _show(self, *, ready: bool) -> None:
        """Switch the kernel names that are bound; what else is under a name stays for the next verb to see."""
        self._shown = None
        for name, kernel in self.kernels():
            if kernel.shows(standing(self.module, name)):
                put(self.module, name, kernel.tensor if ready else kernel.refusing, self)

    def kernels(self) -> list[tuple[str, KernelName]]:
        """Every kernel name that has memory."""
        return [(name, owner.kernel) for name, owner in self.owners.items() if owner.kernel is not None]

    def kernel(self, name: str) -> KernelName | None:
        """The kernel name that is called so, if there is one and it has memory."""
        owner = self.owners.get(name)
        return None if owner is None else owner.kernel

    def kernel_names(self) -> set[str]:
        return set(self.owners)

    def device(self) -> torch.device | None:
        return next((s.buffer.device for s in self.storages()), None)

    def storages(self) -> list[AliasedStorage]:
        return [s.storage for s in self.sources.values() if s.storage is not None]

    def relabel(self, path: str) -> None:
        """Call everything by the module's place in its model."""
        self.label = path
        for source in self.sources.values():
            if source.storage is not None:
                source.storage.label = f"{path}.{source.name}"
        for name, kernel in self.kernels():
            kernel.label = f"{path}.{name}"

    # -- readiness -----------------------------------------------------------------------------------------------------

    @property
    def session(self) -> Any:
        """The reload that has this module, or None."""
        return None if self.holder is None else self.holder()

    @property
    def is_open(self) -> bool:
        return self.readiness is OPEN

    def is_undeclared(self, storage: AliasedStorage) -> bool:
        return any(source.undeclared for source in self.sources.values() if source.storage is storage)

    @property
    def is_ready(self) -> bool:
        """Whether the module may run."""
        self.close_if_unchanged()
        return self.readiness is READY and self.is_bound

    @property
    def is_bound(self) -> bool:
        """Whether every name of a ready module holds what the library put there. Engines put other Parameters in the place of
        ours by ``setattr``, by ``functional_call``, by writing ``module._parameters``: so each forward and each verb looks."""
        shown = self._shown or self._find()
        return shown is not None and all_stand(shown[0])

    @property
    def is_untouched(self) -> bool:
        """Whether the module is ready, and nothing was put under its names or written to them since."""
        shown = self._shown or self._find()
        if self.readiness is not READY or shown is None or not all_stand(shown[0]):
            return False
        for tensor, version, address in shown[1]:  # noqa: SIM110 - see all_stand()
            if tensor._version != version or tensor.data_ptr() != address:
                return False  # by other code
        return True

    def _find(self) -> tuple[list[Slot], list[tuple[Tensor, int, int]]] | None:
        """See :attr:`_shown`; None where one is not ours."""
        slots: list[Slot] = [(b.module.__dict__, "_parameters", b.name, standing(b.module, b.name)) for b in self.bindings()]
        kernels = self.kernels()
        slots += [(self.module.__dict__, "_buffers", name, kernel.tensor) for name, kernel in kernels]
        if self.replaced_names():  # of what was looked at already
            return None
        found = slots + (self._reached or []), [(kernel.tensor, kernel.version, kernel.address) for _, kernel in kernels]
        self._shown = found  # which other threads forget
        return found

    def open(self) -> None:
        """Bytes are about to change, or something else stands under a declared name: refuse until the next commit (law 8)."""
        self.readiness = Readiness.OPENING
        for _, kernel in self.kernels():
            kernel.changing()
        self._show(ready=False)
        self.readiness = OPEN

    def look(self) -> None:
        """A tensor was put under a name: another than ours opens the module, and ours again closes it."""
        if self.readiness is READY and not self.is_bound:
            self.open()
        else:
            self.close_if_unchanged()

    def need_ready(self) -> None:
        """Raise StaleKernelError where the module is open, or its names were replaced. Forwards that a reload waits for go on."""
        session = self.session
        if self.readiness is Readiness.CLOSED and session is not None and session.drain.lets_through():
            return
        self.close_if_unchanged()
        replaced = self.replaced_names()
        if (self.readiness is READY and not replaced) or not self.kernel_names():
            return
        raise StaleKernelError(
            "called while a declared name holds a tensor that was not taken in yet" if replaced else "called while it is open",
            module=self.label,
            name=", ".join(replaced or self.stale_names()) or None,
            expected="a module processed since the last write to its names",
            found="another tensor, or module, in its place" if replaced else "names written and not processed since",
            remedy="Call aliasparam.process(model) after loading.",
        )

    def close_if_unchanged(self) -> None:
        """Close again where nothing changed after all: a name was replaced in passing."""
        if (session := self.session) is not None and session.drain.holds(self):
            return
        versions = self._versions()  # before they are judged: what is written meanwhile is not committed
        if self.readiness is not READY and self._committed and not self.replaced_names() and not self.stale_names():
            self._commit(versions)

    def commit_source(self, name: str) -> None:
        """The module's own code put kernel bytes under this source's kernel name; the module runs if that was the last."""
        self._committed[name] = self.sources[name].version
        self.close_if_unchanged()

    @property
    def moment(self) -> object:
        """Equal at two times where nothing was committed between them, and of several names none was written or derived."""
        for storage in self.storages():
            storage.notice()
        commit = self.readiness, dict(self._committed)
        if len(self.sources) + len(self.derived) == 1:
            return commit  # one name is copied as of one moment, but whether it was ready then must be so at the end
        return commit, self._versions(), [(one.version, one.seen) for one in self.derived.values()]

    def _versions(self) -> dict[str, int]:
        return {name: source.version for name, source in self.sources.items()}

    def _commit(self, versions: dict[str, int]) -> None:
        """Let the module run with sources of these versions, if they still are."""
        with all_locked(storage.lock_number for storage in self.storages()):
            if versions != self._versions() or not all(s.is_loaded for s in self.sources.values()):
                return  # written meanwhile: open until the next verb
            self._committed = versions
            self.readiness = Readiness.OPENING
            self._show(ready=True)
            self.readiness = READY

    def bindings(self) -> list[Binding]:
        """Every checkpoint name, those of shards too."""
        return [binding for source in self.sources.values() for binding in source.bindings]

    def replaced_names(self) -> list[str]:
        """Declared names under which there is another tensor than ours, or whose module was replaced."""
        found = ((b, standing(b.module, b.name)) for b in self.bindings())
        replaced = [b.name for b, tensor in found if not is_same_name(tensor, b.parameter)] + [b.name for b in self.left()]
        return replaced + [n for n, kernel in self.kernels() if not kernel.shows(standing(self.module, n))]

    def left(self) -> list[Binding]:
        """Names of modules that were below this one, and are no longer: another may be put in the place of one."""
        reached = self._reached
        if reached is not None and all_stand(reached):
            return []
        elsewhere = [b for b in self.bindings() if b.module is not self.module]
        ways = ways_below(self.module, {id(b.module) for b in elsewhere}, set()) if elsewhere else []
        below = {id(child) for _, _, _, child in ways}
        left = [b for b in elsewhere if b.below and id(b.module) not in below]
        for binding in elsewhere:
            binding.below = binding.below or id(binding.module) in below
        self._reached = None if left else ways
        return left

    def stale_names(self) -> list[str]:
        """Kernel names that the last commit does not cover: sources written since, or written or moved by other code."""
        return [name for name in self.owners if not self.is_current(name)]

    def is_current(self, name: str) -> bool:
        """Whether a kernel name may be used, and holds what its sources have come to, and they do."""
        owner, kernel = self.owners[name], self.kernel(name)
        if kernel is None or kernel.was_moved:
            return False
        if isinstance(owner, Source):
            return owner.is_loaded and owner.version == self._committed.get(owner.name)
        chained = [source for source in owner.declaration.sources if source in self.derived]
        return not kernel.was_written and owner.seen == self.versions_of(owner) and all(map(self.is_current, chained))

    def versions_of(self, derived: Derived) -> tuple[int, ...]:
        """What the sources of a derivation have come to."""
        return tuple((self.owners.get(name) or self.sources[name]).version for name in derived.declaration.sources)

    def same_values(self, storage: AliasedStorage, before: int) -> None:
        """A storage holds what it did as of version ``before``: what undeclared code derived from that is right."""
        for one in self.derived.values():
            if one.is_undeclared and one.seen == (before,) and self.sources[one.declaration.sources[0]].storage is storage:
                one.seen = (storage.version,)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "holder": None, "_shown": None, "_reached": None}  # a copy of the module is under no reload
