"""One reload of one vLLM model as one transaction over all its layers.

Seams, tried on 0.32.0 (the same text in 0.33.0): in vllm/model_executor/model_loader/reload/layerwise.py, between whose two both
``reload_weights`` and vLLM's weight-transfer engines call ``model.load_weights``; and ``reload_weights`` of inplace.py beside it,
which knows when it failed.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS

import aliasparam
from aliasparam import AliasedParameter, registry_of
from aliasparam.errors import ReloadError
from aliasparam.module.registry import registries
from aliasparam.reload.loading import stand_ins
from aliasparam.reload.targets import Target, find_targets
from aliasparam.storage.coverage import Box

from ..agreement import Agreement, agree_on
from ..folder import check_folder
from ..leftover import is_passed_over
from . import layerwise as plain
from .kernel_format import load_runtime_tensors
from .options import Options, options
from .ranks import world
from .ties import follow

#: The reload in progress of each model.
_open: weakref.WeakKeyDictionary[nn.Module, Reloading] = weakref.WeakKeyDictionary()


class Declared(nn.Module):
    """The declared layers of a model under their paths."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._modules.update({path: module for path, module in model.named_modules() if registry_of(module) is not None})


class Reloading:
    """Between vLLM's initialize and finalize. What ``model.load_weights`` writes to declared layers arrives in a session; what it
    writes to others is held by vLLM, with policies that keep the old weights until the commit."""

    def __init__(self, model: nn.Module, chosen: Options) -> None:
        self.model, self.options = model, chosen
        self.agreement = Agreement(world())
        self.declared = Declared(model)
        self.session = aliasparam.reload(self.declared, scope="partial", policy=chosen.policy, source="vllm")
        self.session.begin()
        self.begun: set[str] = set()
        self._own = _own(model, self.declared)
        self.aside: plain.Aside | None = None
        self._wrap_load_weights()

    def _wrap_load_weights(self) -> None:
        original: Any = self.model.load_weights

        @functools.wraps(original)
        def load_weights(*args: Any, **kwargs: Any) -> Any:
            with stand_ins(self._own, self._write), self.aside or nullcontext():
                return original(*args, **kwargs)

        self.model.__dict__["load_weights"] = load_weights

    def _write(self, name: str, box: Box, value: Tensor) -> None:
        self.begun.add(name)
        self.session.update(name, value, box=box)

    def serve_between(self) -> None:
        """Forwards may come between the chunks of this update. With policies that keep the old weights they get those; otherwise
        they are refused from the first chunk on, because layers of vLLM's own change one by one and cannot refuse."""
        self.aside = plain.Aside(self.model, begins=None if self.keeps_old else self._refuse)

    def _refuse(self) -> None:
        for _, registry in registries(self._first()):
            for storage in registry.storages():
                with storage.lock:
                    storage.changing()

    def _first(self) -> nn.Module:
        return next(self.declared.children())

    @property
    def keeps_old(self) -> bool:
        return self.options.policy != "write-through"

    def commit(self, finalize: Callable[[], None]) -> None:
        """Check that all came, switch, have vLLM process its own layers, and serve; on all ranks or on none.

        Raises:
            ReloadError: something did not come, here or on another rank.
        """
        self._need_all()
        self.session.prepare()
        self.agreement.agree()
        self.session.switch()
        if self.aside is not None:
            self.aside.put_fresh()
        plain.let_go(self.model)
        finalize()
        follow(self.model)
        self.agreement.agree()
        self.session.commit()
        self._close()

    def _need_all(self) -> None:
        everything = self.options.scope == "all"
        wanted = set(self._own)
        if not everything:
            layers = {name.rpartition(".")[0] for name in self.begun}
            wanted = {name for name in wanted if name.rpartition(".")[0] in layers}
        missing = sorted(wanted - self.begun) + plain.incomplete(self.model, everything=everything)
        if missing:
            raise ReloadError(
                f"{len(missing)} tensors or layers did not arrive whole",
                name=", ".join(missing[:5]) + (", …" if len(missing) > 5 else ""),
                expected="every tensor of the model" if everything else "every tensor of each layer that was begun",
                remedy="Send what is missing." + (' For updates of some layers: scope "layers".' if everything else ""),
            )

    def abort(self, why: BaseException | str) -> None:
        """By policy the old weights serve again, or what was written refuses until a whole reload."""
        self.agreement.refuse(why)
        self._close()
        processed = plain.some_complete(self.model)
        plain.put_back(self.model)
        self.session.abort()
        if processed or (self.begun and not self.keeps_old):
            # Layers of vLLM's own may have new weights and cannot refuse: a declared one does, the same on all ranks, or one
            # would wait for the others in a collective.
            aliasparam.invalidate(self._first())
        elif self.aside is not None:
            aliasparam.process(self._first())

    def _close(self) -> None:
        self.model.__dict__.pop("load_weights", None)


def _own(model: nn.Module, declared: Declared) -> dict[str, Target]:
    """By name, what layerwise reload leaves out: parameters of declared layers, but for those that another layer loads (a
    router's bias)."""
    elsewhere = {id(p) for module in model.modules() if registry_of(module) is None for p in module._parameters.values()}
    parameters = {
        f"{path}.{name}"
        for path, module in declared._modules.items()
        if module is not None
        for name, parameter in module._parameters.items()
        if parameter is not None
        and not is_passed_over(parameter)
        and (isinstance(parameter, AliasedParameter) or (name not in SKIP_LOAD_TENSORS and id(parameter) not in elsewhere))
    }
    return {name: target for name, target in find_targets(declared).items() if name in parameters}


def open_reload(model: nn.Module) -> Reloading | None:
    return _open.get(model)


def give_up(model: nn.Module, why: BaseException | str) -> None:
    """Abort the reload of ``model`` that is in progress, if there is one."""
    reloading = _open.pop(model, None)
    if reloading is not None:
        reloading.abort(why)


def initialize(original: Any, model: nn.Module) -> None:
    """AROUND ``initialize_layerwise_reload``."""
    give_up(model, "another reload of this model was begun")
    if not any(registry_of(module) for module in model.modules()):
        original(model)
        return
    reloading = Reloading(model, options())
    original(model)
    if reloading.keeps_old:
        plain.hold(model)
    _open[model] = reloading


def finalize(original: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """AROUND ``finalize_layerwise_reload``."""
    reloading = _open.get(model)
    if reloading is None:
        original(model, *args, **kwargs)
        return
    try:
        reloading.commit(lambda: original(model, *args, **kwargs))
        del _open[model]
    except BaseException as error:
        give_up(model, error)
        raise


def reload_weights(
    original: Any,
    vllm_config: Any,
    model: nn.Module,
    weights_iterator: Iterable[tuple[str, Tensor]] | None = None,
    weights_path: str | None = None,
    is_checkpoint_format: bool = True,
) -> None:
    """AROUND ``reload_weights``."""
    config = vllm_config.model_config
    before = {name: getattr(config, name) for name in ("model", "model_weights", "revision")}
    try:
        if weights_iterator is not None and not is_checkpoint_format:
            load_runtime_tensors(model, weights_iterator, options(vllm_config))
            return
        if weights_iterator is None and weights_path is not None:
            agree_on(world(), lambda: check_folder(str(weights_path), before["model"], world()))
        original(vllm_config, model, weights_iterator, weights_path, is_checkpoint_format)
    except BaseException as error:
        give_up(model, error)
        vars(config).update(before)  # what is served is what is named
        raise
