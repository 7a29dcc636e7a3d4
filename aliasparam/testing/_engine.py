"""How an engine touches a module: loads its parameters, calls it, and lets a kernel read it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .. import registry_of
from ..module.registry import registries
from ._values import same_bytes

Outputs = Callable[[nn.Module], Mapping[str, Tensor]]
Forward = Callable[[nn.Module], Any]


def kernel_names(module: nn.Module) -> dict[str, Tensor]:
    """What a kernel reads of a module: the declared kernel names, or every tensor that is no parameter from the start."""
    registry = registry_of(module)
    if registry is not None and registry.kernel_names():
        return {name: module.get_buffer(name) for name in sorted(registry.kernel_names())}
    created = module.__dict__.get("_created_with", frozenset())
    found = {n: t for n, t in (*module._parameters.items(), *module._buffers.items()) if t is not None and n not in created}
    found.update({n: t for n, t in module.__dict__.items() if isinstance(t, Tensor)})
    return found


def load(module: nn.Module, name: str, value: Tensor, *, reuse: bool = True) -> None:
    """A whole tensor by its parameter's loader."""
    parameter = module.get_parameter(name)
    loader = getattr(parameter, "weight_loader", None)
    try:
        if loader is None:
            parameter.data.copy_(value)
        else:
            loader(parameter, value)
    finally:
        if reuse:  # the transport uses its buffer again
            poison(value)


def load_rows(module: nn.Module, name: str, value: Tensor, first: int) -> None:
    module.get_parameter(name).data.narrow(0, first, value.shape[0]).copy_(value)
    poison(value)


def poison(value: Tensor) -> None:
    value.reshape(-1).view(torch.uint8).fill_(0x5A)


_PRIVATE = ("_alias", "_is_param")


def loader_attributes(parameter: Tensor) -> frozenset[str]:
    return frozenset(k for k in parameter.__dict__ if not k.startswith(_PRIVATE))


def allocated_bytes(module: nn.Module) -> int:
    """Bytes of all distinct storages that the module's tensors lie in."""
    attributes = (t for m in module.modules() for t in m.__dict__.values() if isinstance(t, Tensor))
    tensors = (*module.parameters(), *module.buffers(), *attributes)
    return sum({s.data_ptr(): s.nbytes() for t in tensors for s in [Tensor.untyped_storage(t)]}.values())


# -- the forward -----------------------------------------------------------------------------------------------------------


def forward_of(module: nn.Module, outputs: Outputs) -> Forward | None:
    """How to see what ``module`` answers: by its forward, if it takes no argument; for declared modules, else, by whether
    their forward would be refused, and what the kernel would read. None where nothing tells."""
    if type(module).forward is not nn.Module.forward and not _required(module.forward):
        return lambda module: _copied(module())
    if registries(module):
        return lambda module: _let_through(module, outputs)
    return None


def _required(forward: Callable[..., Any]) -> list[str]:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(forward).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]


def _let_through(module: nn.Module, outputs: Outputs) -> Any:
    for part in module.modules():
        for hook in list(part._forward_pre_hooks.values()):
            if str(getattr(hook, "__module__", "")).startswith("aliasparam"):
                hook(part, ())
    return _copied(dict(outputs(module)))


def _copied(answer: Any) -> list[Any]:
    """The answer's leaves; tensors as copies, later writes must not change what was answered."""
    return [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in tree_flatten(answer)[0]]


def same_answer(found: list[Any], expected: list[Any]) -> bool:
    return len(found) == len(expected) and all(
        same_bytes(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else type(a) is type(b) and a == b
        for a, b in zip(found, expected, strict=True)
    )
