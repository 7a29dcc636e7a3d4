"""How a Parameter that was registered becomes the checkpoint name of a storage."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._declare import Declaration, Derivation
from ._parameter import AliasedParameter, _Aliased, loader_attributes, make_parameter, take_over
from ._planning import Source
from ._storage import AliasedStorage, State
from .errors import DeclarationError

if TYPE_CHECKING:
    from ._registry import AliasRegistry


def take(registry: AliasRegistry, source: Source, tensor: Tensor, state: State) -> None:
    """Make ``tensor``, the Parameter now under the source's name, the storage's checkpoint name."""
    label = f"{registry.label}.{source.name}"
    with torch.no_grad():
        storage = _storage_over(label, source, tensor, state) or _storage_beside(label, source, tensor, state)
        parameter = take_over(tensor, storage, storage.checkpoint)
        if parameter is None:  # the old object stays in somebody's hands, so its memory stays its own
            storage = _storage_beside(label, source, tensor, state)
            parameter = make_parameter(storage, storage.checkpoint, type(tensor))
            parameter.__dict__.update(loader_attributes(tensor))
    parameter.__dict__.update({k: v for k, v in source.attributes.items() if k not in parameter.__dict__})
    registry.own(source, storage, parameter)


def check_sources(registry: AliasRegistry, declarations: Sequence[Declaration]) -> None:
    """Raise DeclarationError where a declared Parameter is of a kind that has no memory of its own to share."""
    distributed: Any = sys.modules.get("torch.distributed.tensor")  # who has a DTensor has imported it
    if distributed is None:
        return
    for name, parameter in registry.module._parameters.items():
        if isinstance(parameter, distributed.DTensor) and any(name in _source_names(d) for d in declarations):
            raise DeclarationError(
                "a DTensor is a part of a tensor over several ranks; only local tensors can be declared",
                module=registry.label,
                name=name,
                expected="an nn.Parameter with memory of its own",
                found=f"{type(parameter).__name__} (a DTensor) of shape {list(parameter.shape)}",
                remedy="Declare the module before it is sharded, on each rank with the part it serves.",
            )


def _source_names(declaration: Declaration) -> tuple[str, ...]:
    return declaration.sources if isinstance(declaration, Derivation) else (declaration.source,)


def share(registry: AliasRegistry, source: Source, parameter: AliasedParameter) -> None:
    """A tied weight which another module declared: the same storage. See :func:`check_tie`."""
    registry.own(source, parameter._alias_storage, parameter)


def check_tie(label: str, source: Source, parameter: Tensor | None) -> None:
    """Raise DeclarationError for a Parameter that another module declared, unless to the same format."""
    if not isinstance(parameter, _Aliased):
        return
    storage = parameter._alias_storage
    if not isinstance(parameter, AliasedParameter) or parameter._alias_memory is not storage.checkpoint:
        raise DeclarationError(
            "this Parameter is a view of a storage that another module declared",
            module=label,
            name=source.name,
            expected="the whole Parameter, or one with memory of its own",
            found=f"a view of {storage.label}",
            remedy="Declare the whole, and show parts of it: registry.show_shards(...).",
        )
    if storage.plan != source.plan or (storage.kernel_name is None) != (not source.derived):
        raise DeclarationError(
            "a tied weight is declared to two different kernel formats",
            module=label,
            name=source.name,
            expected=f"{storage.plan.transform} as in {storage.label}",
            found=source.plan.transform,
            remedy="Declare it once, or untie it with clone().",
        )


def _storage_over(label: str, source: Source, tensor: Tensor, state: State) -> AliasedStorage | None:
    """A storage that takes over the tensor's own allocation (no copy, no new address), if that is exactly the capacity and
    nobody else looks at it."""
    plan, memory = source.plan, tensor.untyped_storage()
    alone = torch._C._storage_Use_Count(memory._cdata) <= 2  # the tensor and the object we hold just now
    if not (alone and tensor.is_contiguous() and memory.nbytes() == plan.nbytes == plan.source.nbytes):
        return None
    with torch.inference_mode(False):  # a tensor made in inference mode could not be written outside it
        plain = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(memory, 0, (plan.nbytes,), (1,))
    return AliasedStorage(label, plan, plain, state, has_kernel_name=bool(source.derived))


def _storage_beside(label: str, source: Source, tensor: Tensor, state: State) -> AliasedStorage:
    """A storage with memory of its own, filled from the tensor if its bytes count."""
    with torch.inference_mode(False):
        buffer = torch.empty(source.plan.nbytes, dtype=torch.uint8, device=tensor.device)
    storage = AliasedStorage(label, source.plan, buffer, state, has_kernel_name=bool(source.derived))
    if state is State.CHECKPOINT:
        storage.checkpoint.copy_(tensor.detach())
    return storage
