"""Noticing that a declared name was replaced.

Engines put other Parameters in the place of ours by ``setattr``, by ``functional_call``, by writing ``module._parameters``. The
kernel names do not follow by themselves, so from then on a forward would use the old weights without a word. ``Module.half()``
and ``Module.to()`` write ``module._buffers``, where kernel names are. A declared module keeps both in dicts that tell the
registry; the check itself happens at the next forward or verb.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

if TYPE_CHECKING:
    from ._names import RegistryNames

_TRACED = (FakeTensor, FunctionalTensor)  # torch.export traces with stand-ins, and puts everything back


class _Watched(dict[str, Any]):
    """A dict of names that tells registries when one of theirs is replaced."""

    __slots__ = ("watchers",)

    watchers: dict[str, RegistryNames]

    def __setitem__(self, name: str, value: Any) -> None:
        registry = self.watchers.get(name)
        if registry is None or value is self.get(name) or isinstance(value, _TRACED):
            super().__setitem__(name, value)
            return
        ours = registry.shows(name, value)
        if not ours:
            self._check(registry, name, value)
        super().__setitem__(name, value)
        registry.look_again() if ours else registry.suspect()

    def _check(self, registry: RegistryNames, name: str, value: Any) -> None:
        """Refuse what cannot be under this name even in passing."""

    def update(self, *args: Any, **kwargs: Any) -> None:
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self), dict(self), self.watchers)


class WatchedParameters(_Watched):
    """``module._parameters`` of a module which shows declared names."""

    __slots__ = ()


class WatchedBuffers(_Watched):
    """``module._buffers`` of a module which declares kernel names."""

    __slots__ = ()

    def _check(self, registry: RegistryNames, name: str, value: Any) -> None:
        registry.check_kernel_name(name, value)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        if (registry := self.watchers.get(name)) is not None:
            registry.suspect()


def watch(module: nn.Module, name: str, registry: RegistryNames) -> None:
    """Have ``registry`` told when the Parameter ``name`` is replaced on ``module``."""
    _watched(module, "_parameters", WatchedParameters).watchers[name] = registry


def put(module: nn.Module, name: str, value: Any) -> None:
    """Bind without telling: for the registry's own parameters."""
    dict.__setitem__(module._parameters, name, value)


def put_buffer(module: nn.Module, name: str, tensor: Tensor, registry: RegistryNames) -> None:
    """Bind a kernel name as a non-persistent buffer without telling, and have ``registry`` told when it is replaced."""
    if module._buffers.get(name) is tensor:
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
        names = module.__dict__[attribute] = _rebuild(kind, dict(names), {})
    return names


def _rebuild(kind: type[_Watched], items: dict[str, Any], watchers: dict[str, RegistryNames]) -> _Watched:
    watched = kind(items)
    watched.watchers = watchers
    return watched
