"""One session a module."""

from __future__ import annotations

import threading
import weakref

from torch import nn

from ..errors import ReloadError
from ..module.registry import AliasRegistry, registries, registry_of

#: Who has a module. Neither keeps the other alive, so an abandoned session frees its modules.
_claims: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Claim]] = weakref.WeakKeyDictionary()
_taking = threading.RLock()  # from the look to the claim, or its end; an interrupt at its end may leave it held, by this thread


class Claim:
    """The modules that ``session`` has, from :meth:`take` to :meth:`end`: nothing else reloads or processes them.

    Attributes:
        modules, registries: of the model when they were taken.
    """

    def __init__(self, session: object) -> None:
        self._session, self._self = weakref.ref(session), weakref.ref(self)
        self.modules: list[nn.Module] = []
        self.registries: list[AliasRegistry] = []

    def take(self, model: nn.Module) -> None:
        """
        Raises:
            ReloadError: another session that is alive has one of the modules.
        """
        with _taking:
            declared, modules = [registry for _, registry in registries(model)], list(model.modules())
            for module in modules:
                other = _claim_of(module)
                if other is not None and other is not self:
                    raise ReloadError(
                        "a reload of this model is already open",
                        module=type(model).__name__,
                        expected="one reload at a time",
                        found=f"another one, of {type(module).__name__}, in progress",
                        remedy="Finish or abort it first.",
                    )
            self.modules, self.registries = modules, declared
            for module in modules:
                _claims[module] = self._self
        self.hold()

    def hold(self) -> None:
        """Nothing processes the modules."""
        for registry in self.registries:
            registry.holder = self._session

    def lend(self) -> None:
        """The modules may be processed; no other session gets one."""
        for registry in self.registries:
            if registry.holder is self._session:
                registry.holder = None

    def registries_of(self, model: nn.Module) -> list[AliasRegistry]:
        """Of the modules that are still in the model.

        Raises:
            ReloadError: a module was put into the model since.
        """
        found = []
        for path, module in model.named_modules():
            if _claim_of(module) is not self:
                raise ReloadError(
                    "a module was put into the model while its reload was open: its weights are of another generation",
                    module=path or type(model).__name__,
                    expected="the modules that were there at the begin",
                    found=f"another {type(module).__name__}",
                    remedy="Abort, and reload the model that is to serve.",
                )
            if (registry := registry_of(module)) is not None:
                found.append(registry)
        return found

    def end(self) -> None:
        """Also of modules that were taken out of the model. May be called again, as an interrupt may come between."""
        with _taking:  # whoever takes one meanwhile keeps it
            self.lend()
            for module in self.modules:
                if _claim_of(module) is self:
                    del _claims[module]
        self.modules, self.registries = [], []


def _claim_of(module: nn.Module) -> Claim | None:
    reference = _claims.get(module)
    return None if reference is None else reference()
