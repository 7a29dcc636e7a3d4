"""Noticing that a declared name was replaced.

Engines put other Parameters in the place of ours by ``setattr``, by ``functional_call``, by writing ``module._parameters``. The
kernel names do not follow by themselves, so from then on a forward would use the old weights without a word. A declared module
keeps its parameters in a dict that tells the registry; the check itself happens at the next forward or verb.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

if TYPE_CHECKING:
    from ._registry import AliasRegistry


class WatchedParameters(dict[str, Any]):
    """``module._parameters`` of a module which shows declared names."""

    __slots__ = ("watchers",)

    watchers: dict[str, AliasRegistry]

    def __setitem__(self, name: str, value: Any) -> None:
        registry = self.watchers.get(name)
        changed = registry is not None and value is not self.get(name)
        super().__setitem__(name, value)
        if changed and registry is not None and not isinstance(value, FakeTensor):  # torch.export traces with stand-ins
            registry.suspect()

    def update(self, *args: Any, **kwargs: Any) -> None:
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (dict(self), self.watchers)


def watch(module: nn.Module, name: str, registry: AliasRegistry) -> None:
    """Have ``registry`` told when ``name`` is replaced on ``module``."""
    parameters = module._parameters
    if not isinstance(parameters, WatchedParameters):
        parameters = _rebuild(dict(parameters), {})
        module.__dict__["_parameters"] = parameters
    parameters.watchers[name] = registry


def put(module: nn.Module, name: str, value: Any) -> None:
    """Bind without telling: for the registry's own parameters."""
    dict.__setitem__(module._parameters, name, value)


def _rebuild(items: dict[str, Any], watchers: dict[str, AliasRegistry]) -> WatchedParameters:
    watched = WatchedParameters(items)
    watched.watchers = watchers
    return watched
