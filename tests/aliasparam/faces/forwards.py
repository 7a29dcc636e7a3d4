"""The forward: eager, compiled, exported; of the layer, and of a parent which holds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from aliasparam import registry_of

from .titled import PREPARED, Face, kernel, titled, weight

#: Functions compiled while their layer was ready.
_COMPILED: WeakKeyDictionary[nn.Module, Callable[[Tensor], Any]] = WeakKeyDictionary()


def one(layer: nn.Module) -> Tensor:
    return torch.ones(1, device=weight(layer).device)


def forward(layer: nn.Module) -> Tensor:
    return layer(one(layer))


def compiled(layer: nn.Module) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(layer, fullgraph=True, backend="aot_eager")(one(layer))


def exported(layer: nn.Module) -> Tensor:
    if registry_of(layer) is None:
        return forward(layer)
    return torch.export.export(layer, (one(layer),)).module()(one(layer))


class Parent(nn.Module):
    """Reads the child's kernel name, and never calls the child."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, x: Tensor) -> Tensor:
        return x + kernel(self.child).float().sum()


def before(title: str, function: Callable[[nn.Module], Callable[[Tensor], Any]], **options: Any) -> Face:
    """A face that calls what was compiled, and called twice, while the layer was ready. The plain layer is not compiled."""

    def prepare(layer: nn.Module) -> None:
        made = function(layer)
        if registry_of(layer) is not None:
            made = torch.compile(made, backend="eager", **options)
            made(one(layer))
            made(one(layer))
        _COMPILED[layer] = made

    PREPARED[title] = prepare
    return lambda layer: _COMPILED[layer](one(layer))


_BEFORE: dict[str, tuple[Callable[[nn.Module], Callable[[Tensor], Any]], dict[str, Any]]] = {
    "compiled before it became so": (lambda layer: layer, {"fullgraph": True}),
    "compiled before, without `fullgraph`": (lambda layer: layer, {}),
    "a parent compiled before": (lambda layer: nn.Sequential(layer), {"fullgraph": True}),
    "a parent compiled before, without `fullgraph`": (lambda layer: nn.Sequential(layer), {}),
    "a function that calls it, compiled before": (lambda layer: lambda x: layer(x) * 2, {"fullgraph": True}),
    "a parent that reads the kernel name, compiled before": (lambda layer: Parent(layer), {"fullgraph": True}),
}


def _compiled_read(layer: nn.Module, **options: Any) -> Tensor:
    def read(x: Tensor) -> Tensor:
        return x + weight(layer).float().sum()

    if registry_of(layer) is None:
        return read(one(layer))
    torch._dynamo.reset()
    return torch.compile(read, backend="eager", **options)(one(layer))


titled(
    "forward over the kernel name",
    {
        "eager": forward,
        "a parent (`nn.Sequential`)": lambda layer: nn.Sequential(layer)(one(layer)),
        "a parent that reads the kernel name without calling the layer": lambda layer: Parent(layer)(one(layer)),
        "`torch.compile(fullgraph=True)`": compiled,
        "`torch.export`": exported,
        **{title: before(title, function, **options) for title, (function, options) in _BEFORE.items()},
    },
)
titled(
    "a checkpoint name in compiled code",
    {
        "`torch.compile` of a function that reads it": _compiled_read,
        "the same with `fullgraph=True`": lambda layer: _compiled_read(layer, fullgraph=True),
    },
)
