"""vLLM's layerwise reload (vllm/model_executor/model_loader/reload/), for what this package did not declare.

Layerwise reload puts fresh checkpoint-shaped tensors in place, runs ``process_weights_after_loading`` on them and copies the
results into the old memory. Declared layers need none of it: their names are written as they are. All seams are in its
``layerwise.py``; tried on 0.32.0, and the same text in 0.33.0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import layerwise

from aliasparam import registry_of

from .ties import tied

#: What the count of a layer starts at while it shall not be complete: vLLM processes a layer when its count is reached.
_HELD = -(1 << 62)


def capture(original: Any, layer: nn.Module) -> Any:
    """AROUND ``capture_layer_to_meta``."""
    return original(layer) if registry_of(layer) is None else ({}, {})


def leave_out(original: Any, layer: nn.Module, *args: Any) -> None:
    """AROUND ``restore_layer_on_meta`` and ``initialize_online_processing``."""
    if registry_of(layer) is None:
        original(layer, *args)


def make_loader(original: Any, layer: nn.Module, name: str) -> Any:
    """AROUND ``make_online_process_loader``: a layer waits with what it was given until it has all, and senders use their buffers
    again: it waits with copies."""
    inner = original(layer, name)

    @functools.wraps(inner, assigned=("__doc__", "__annotations__"))
    def online_process_loader(*args: Any, **kwargs: Any) -> Any:  # vLLM unwraps loaders of this name
        result = inner(*args, **kwargs)
        info = layerwise.get_layerwise_info(layer)
        if info.loaded_weights:
            given = info.loaded_weights[-1][1].arguments
            given.update(owned(given, on_host=info.load_numel < 0))
        return result

    return online_process_loader


def owned(arguments: dict[str, Any], *, on_host: bool) -> dict[str, Any]:
    """Arguments of a loader with copies of the incoming tensors, ``param`` left out."""
    values = {n: v for n, v in arguments.items() if isinstance(v, Tensor) and n != "param" and not v.is_meta}
    return {n: v.to("cpu", copy=True) if on_host else v.clone() for n, v in values.items()}


def loading(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """(path, layer, what vLLM knows of its loading) of every layer that was not declared and is not complete yet."""
    for path, layer in model.named_modules():
        info = layerwise.get_layerwise_info(layer)
        if registry_of(layer) is None and info.can_load():
            yield path, layer, info


def hold(model: nn.Module) -> None:
    """From now on no layer is processed when it is complete, but when vLLM finalizes, after :func:`let_go`."""
    for _, _, info in loading(model):
        info.load_numel = _HELD


def let_go(model: nn.Module) -> None:
    """Have ``finalize_layerwise_processing`` process what was held: it takes layers of which it believes that something lacks."""
    for _, _, info in loading(model):
        if info.load_numel < 0:
            info.load_numel -= _HELD
            if info.load_numel:
                info.load_numel_total = max(info.load_numel_total, info.load_numel + 1)


def put_back(model: nn.Module) -> None:
    """Give every layer that is not complete its old tensors back, and forget what came for it."""
    for _, layer, info in loading(model):
        layerwise._place_kernel_tensors(layer, info)
        info.reset()


class Aside:
    """Between two chunks of an update layers that wait have their old tensors, so that forwards find weights and not
    placeholders; entered while ``model.load_weights`` runs, which fills those.

    Only where all that comes passes ``model.load_weights``.

    Args:
        begins: called before anything is loaded.
    """

    def __init__(self, model: nn.Module, begins: Callable[[], None] | None = None) -> None:
        self._model, self._fresh = model, dict[nn.Module, tuple[dict[str, Any], dict[str, Any], set[str]]]()
        self._begins = begins
        self.put_old()

    def __enter__(self) -> None:
        if self._begins is not None:
            self._begins()
        self.put_fresh()

    def __exit__(self, *error: object) -> None:
        self.put_old()

    def put_old(self) -> None:
        for _, layer, info in loading(self._model):
            self._fresh[layer] = {**layer._parameters}, {**layer._buffers}, {*layer._non_persistent_buffers_set}
            layerwise._place_kernel_tensors(layer, info)

    def put_fresh(self) -> None:
        for layer, (parameters, buffers, passing) in self._fresh.items():
            for name in layerwise.get_layer_tensors(layer):
                delattr(layer, name)
            for name, parameter in parameters.items():
                layer.register_parameter(name, parameter)
            for name, buffer in buffers.items():
                layer.register_buffer(name, buffer, persistent=name not in passing)
        self._fresh.clear()


def some_complete(model: nn.Module) -> bool:
    """Whether vLLM has processed a layer since it initialized: such a layer has new weights."""
    waiting = {id(layer) for _, layer, _ in loading(model)}
    return any(
        registry_of(layer) is None and id(layer) not in waiting and any(True for _ in layer.parameters(recurse=False))
        for layer in model.modules()
    )


def incomplete(model: nn.Module, *, everything: bool) -> list[str]:
    """Layers of which some elements came and some did not; with ``everything`` also those of which none came.

    Attention layers have scales that a checkpoint need not have; what a vocabulary is padded to is filled by its loader.
    """
    theirs = {layer for layer, _, _ in tied(model)}
    waiting = [found for found in loading(model) if found[1] not in theirs]
    came = {id(layer) for _, layer, info in waiting if _count(info)}
    there = {id(p) for m in model.modules() if _not_waiting(m, came, waiting) for p in m.parameters(recurse=False)}
    there |= {id(p) for _, layer, info in waiting if id(layer) in came for p in info.kernel_tensors[0].values()}
    found = []
    for path, layer, info in waiting:
        if layerwise.is_deferred_attention_layer(layer):
            continue
        missing = layerwise.get_layer_size(layer) - _count(info)
        shown = info.kernel_tensors[0].values()
        if id(layer) in came and missing > 0 and not isinstance(layer, VocabParallelEmbedding):
            found.append(f"{path} ({missing} elements)")
        elif everything and id(layer) not in came and any(id(p) not in there for p in shown):
            found.append(path)
    return found


def _not_waiting(layer: nn.Module, came: set[int], waiting: list[Any]) -> bool:
    return registry_of(layer) is None and all(layer is not other for _, other, _ in waiting)


def _count(info: Any) -> int:
    count: int = info.load_numel
    return count - _HELD if count < 0 else count
