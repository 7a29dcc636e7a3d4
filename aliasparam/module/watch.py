"""Noticing that a declared name was replaced.

Engines put other Parameters in the place of ours by ``setattr``, by ``functional_call``, by writing ``module._parameters``. The
kernel names do not follow by themselves, so from then on a forward would use the old weights without a word. ``Module.half()``
and ``Module.to()`` write ``module._buffers``, where kernel names are. A declared module keeps both in dicts that tell the
registry, whatever way they are changed; that they are still there is seen by the guard at the next forward, and by verbs.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any, Protocol

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ..errors import AdoptionError, StateError
from ..storage.kernel_name import KernelName
from ..tensors.parameter import AliasedParameter, SavedName

_TRACED = (FakeTensor, FunctionalTensor)  # torch.export traces with stand-ins, and puts everything back


class Watcher(Protocol):
    """Who is told: a registry."""

    label: str

    @property
    def is_open(self) -> bool: ...
    @property
    def moment(self) -> object: ...
    def shows(self, names: object, name: str, value: Any) -> bool: ...
    def kernel(self, name: str) -> KernelName | None: ...
    def open(self) -> None: ...
    def close_if_unchanged(self) -> None: ...


class _Watched(dict[str, Any]):
    """A dict of names that tells registries when one of theirs is replaced or taken away."""

    __slots__ = ("watchers",)

    watchers: dict[str, Watcher]

    def __setitem__(self, name: str, value: Any) -> None:
        registry = self.watchers.get(name)
        if registry is None or value is self.get(name) or isinstance(value, _TRACED):
            super().__setitem__(name, value)
            return
        ours = registry.shows(self, name, value)
        if not ours:
            self._check(registry, name, value)
            self._tell(name)
        super().__setitem__(name, value)
        if ours:
            registry.close_if_unchanged()

    def _check(self, registry: Watcher, name: str, value: Any) -> None:
        """Refuse what cannot be under this name even in passing."""

    def __delitem__(self, name: str) -> None:
        self._tell(name)
        super().__delitem__(name)

    def pop(self, name: str, *default: Any) -> Any:
        self._tell(name)
        return super().pop(name, *default)

    def popitem(self) -> Any:
        self._tell(next(reversed(self), ""))
        return super().popitem()

    def __ior__(self, other: Any) -> Any:  # type: ignore[misc]
        self.update(other)
        return self

    # The other ways to change a dict, in terms of these.
    update = MutableMapping.update
    setdefault = MutableMapping.setdefault
    clear = MutableMapping.clear

    def _tell(self, name: str) -> None:
        registry = self.watchers.get(name)
        if registry is not None and not registry.is_open:
            registry.open()

    def __reduce_ex__(self, protocol: Any) -> Any:
        unchanged = _Unchanged(self.watchers)
        return _rebuilt, (type(self), {n: self._saved(n, v) for n, v in self.items()}, self.watchers, unchanged)

    def _saved(self, name: str, value: Any) -> Any:
        raise NotImplementedError


class WatchedParameters(_Watched):
    """``module._parameters`` of a module which shows declared names."""

    __slots__ = ()

    def _saved(self, name: str, value: Any) -> Any:
        return SavedName.of(value) if isinstance(value, AliasedParameter) else value


class WatchedBuffers(_Watched):
    """``module._buffers`` of a module which declares kernel names."""

    __slots__ = ()

    def _saved(self, name: str, value: Any) -> Any:
        registry = self.watchers.get(name)
        kernel = None if registry is None else registry.kernel(name)
        if registry is None or kernel is None or not kernel.shows(value):
            return value
        return _SavedKernel(kernel, registry, value is not kernel.tensor)

    def _check(self, registry: Watcher, name: str, value: Any) -> None:
        kernel = registry.kernel(name)
        if kernel is None or not isinstance(value, Tensor):
            return
        found, expected = (value.dtype, value.shape), (kernel.memory.dtype, kernel.memory.shape)
        if found != expected:
            raise AdoptionError(
                "a kernel-format name was given another dtype or shape",
                module=registry.label,
                name=name,
                expected=f"{expected[0]} {list(expected[1])}",
                found=f"{found[0]} {list(found[1])}",
                remedy="Module.half() and the like cannot apply to declared modules; cast the others.",
            )


class _Unchanged:
    """What is copied or pickled after all names of a module, and refuses where one was written or derived meanwhile: a copy would
    have some names from before a load and some from after it."""

    def __init__(self, watchers: dict[str, Watcher]) -> None:
        registries = {id(registry): registry for registry in watchers.values()}.values()
        self._began = [(registry, registry.moment) for registry in registries]

    def __reduce__(self) -> Any:
        for registry, moment in self._began:
            if registry.moment != moment:
                raise StateError(
                    "this module was written or processed while it was copied",
                    module=registry.label,
                    expected="one generation of weights in all its names",
                    found="another version of a name at the end",
                    remedy="Copy it again, or while no other thread loads.",
                )
        return type(None), ()


class _SavedKernel:
    """What stands for a kernel name in the pickle of its module: its bytes are its storage's, which is saved once."""

    def __init__(self, kernel: KernelName, registry: Watcher, is_open: bool) -> None:
        self.kernel, self.registry, self.is_open = kernel, registry, is_open

    def __reduce__(self) -> Any:
        return _face, (self.kernel, self.registry, self.is_open)


def _face(kernel: KernelName, registry: Watcher, is_open: bool) -> Tensor:
    """What the copied registry shows; where the copy began at it, and it has no state yet, what was shown."""
    return kernel.refusing if getattr(registry, "is_open", is_open) else kernel.tensor


def is_watched(module: nn.Module) -> bool:
    """Whether a declared module still has the dicts that tell."""
    return type(module._parameters) is WatchedParameters and type(module._buffers) is WatchedBuffers


def watch(module: nn.Module, name: str, registry: Watcher) -> None:
    """Have ``registry`` told when the Parameter ``name`` is replaced on ``module``."""
    _watched(module, "_parameters", WatchedParameters).watchers[name] = registry


def standing(module: nn.Module, name: str) -> Any:
    """What is under the name of a Parameter: after ``del`` that may be an attribute, which hides Parameters, or a buffer."""
    if name in module.__dict__:
        return module.__dict__[name]
    found = module._parameters.get(name)
    return module._buffers.get(name) if found is None else found


def put(module: nn.Module, name: str, value: Any) -> None:
    """Bind without telling: for the registry's own parameters."""
    module.__dict__.pop(name, None)
    if module._buffers.pop(name, None) is not None:
        module._non_persistent_buffers_set.discard(name)
    dict.__setitem__(module._parameters, name, value)


def put_buffer(module: nn.Module, name: str, tensor: Tensor, registry: Watcher) -> None:
    """Bind a kernel name as a non-persistent buffer without telling, and have ``registry`` told when it is replaced."""
    if module._buffers.get(name) is tensor and type(module._buffers) is WatchedBuffers:
        return
    module._parameters.pop(name, None)
    module.__dict__.pop(name, None)
    buffers = _watched(module, "_buffers", WatchedBuffers)
    buffers.watchers[name] = registry
    dict.__setitem__(buffers, name, tensor)
    module._non_persistent_buffers_set.add(name)


def _watched(module: nn.Module, attribute: str, kind: type[_Watched]) -> _Watched:
    names = module.__dict__[attribute]
    if not isinstance(names, kind):
        names = module.__dict__[attribute] = _rebuilt(kind, dict(names), {})
    return names


def _rebuilt(
    kind: Callable[[dict[str, Any]], _Watched], items: dict[str, Any], watchers: dict[str, Watcher], unchanged: None = None
) -> _Watched:
    watched = kind(items)
    watched.watchers = watchers
    return watched
