"""How a Parameter that was registered becomes the checkpoint name of a storage."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..errors import DeclarationError
from ..layout.layout import bound_to
from ..storage.overlap import check_memory
from ..storage.reorder import reorder
from ..storage.states import State
from ..storage.storage import AliasedStorage
from ..tensors.faces import _Aliased, loader_attributes, place_in
from ..tensors.parameter import AliasedParameter, make_parameter, take_over
from ..torch_private import is_alone, outside_inference
from .names import ModuleNames
from .planning import Source


def allocate(names: ModuleNames, source: Source, *, loaded: bool) -> None:
    """Give a source its storage, with the values of the tensor now under its name if they count."""
    tensor = names.module._parameters[source.name]
    if tensor is None:
        raise AssertionError(f"{names.label}.{source.name} vanished while it was being declared")
    if isinstance(tensor, AliasedParameter):
        names.bind_storage(source, tensor._alias_storage, tensor)  # a tied weight which another module declared: see _check_tie
    elif tensor.device.type == "meta":
        source.attributes.update(loader_attributes(tensor))  # a loader will put a real tensor here: see adopt.py
    else:
        adopt_memory(names, source, tensor, loaded=loaded)


def adopt_memory(names: ModuleNames, source: Source, tensor: Tensor, *, loaded: bool) -> None:
    """Make ``tensor``, the Parameter now under the source's name, the storage's checkpoint name.

    Its own memory is taken over where it is exactly the capacity and nobody else looks at it (no copy, no new address); what it
    holds is brought into kernel order by blocks. Memory that somebody else owns is never written: the storage gets its own.
    """
    label = f"{names.label}.{source.name}"
    memory = _memory_of(source, tensor)
    values = tensor.detach() if loaded and memory is None else None
    state = State.EMPTY if not loaded else State.INVALID  # until the values are in order
    storage = _storage(label, source, tensor.device, memory, state)
    parameter = take_over(tensor, storage, storage.geometry)
    if parameter is None:  # the old object stays in somebody's hands, so its memory stays its own
        values = tensor.detach() if loaded else None
        storage = _storage(label, source, tensor.device, None, state)
        parameter = make_parameter(storage, storage.geometry, type(tensor))
        parameter.__dict__.update(loader_attributes(tensor))
    for name, value in source.attributes.items():
        parameter.__dict__.setdefault(name, value)
    names.bind_storage(source, storage, parameter)
    if values is not None:
        storage.write(storage.bound.whole, values.to(storage.bound.dtype))
    elif loaded:
        reorder(storage.elements, bound_to(None, storage.bound.shape, storage.bound.dtype), storage.bound)
        storage.states.put_all(State.LOADED)


def _memory_of(source: Source, tensor: Tensor) -> Tensor | None:
    """The tensor's own allocation as flat bytes, if it can become the storage's."""
    plan, memory = source.plan, tensor.untyped_storage()
    fits = plan.is_exact and memory.nbytes() == plan.nbytes and tensor.is_contiguous() and tensor.storage_offset() == 0
    if not fits or not is_alone(memory):
        return None
    with outside_inference():  # a tensor made in inference mode could not be written outside it
        return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(memory, 0, (plan.nbytes,), (1,))


def _storage(label: str, source: Source, device: torch.device, memory: Tensor | None, state: State) -> AliasedStorage:
    plan = source.plan
    if memory is None:
        with outside_inference():
            memory = torch.zeros(plan.nbytes, dtype=torch.uint8, device=device)
    return AliasedStorage(label, plan.source, source.layout, memory, state, plan.kernel.dtype if source.derived else None)


def check_sources(names: ModuleNames, sources: Sequence[Source]) -> None:
    """Raise DeclarationError where the Parameters of ``sources`` cannot each have a storage of their own."""
    beside = {n: p for n, p in names.module._parameters.items() if p is not None and not is_lazy(p)}
    declared = {source.name: beside.pop(source.name) for source in sources}
    check_memory(names.label, declared, beside)
    for source in sources:
        _check_tie(source, declared[source.name])
    trained = sorted(name for name, parameter in declared.items() if parameter.requires_grad)
    if trained:  # their kernel bytes are no function of autograd
        warnings.warn(
            f"{type(names.module).__name__}: {', '.join(trained)} had requires_grad=True and will have no gradients: declared "
            "names are not trained. Register them with requires_grad=False, or train a tensor of your own and write it in.",
            UserWarning,
            stacklevel=4,
        )


def _check_tie(source: Source, parameter: Tensor) -> None:
    """Raise DeclarationError for a Parameter that another module declared, unless to the same format."""
    if not isinstance(parameter, _Aliased):
        return
    storage = parameter._alias_storage
    if not isinstance(parameter, AliasedParameter) or place_in(parameter._alias_geometry) != place_in(storage.geometry):
        raise DeclarationError(
            "this Parameter is a view of a storage that another module declared",
            name=source.name,
            expected="the whole Parameter, or one with memory of its own",
            found=f"a view of {storage.label}",
            remedy="Declare the whole, and show parts of it: registry.show_shards(...).",
        )
    dtype = source.plan.kernel.dtype if source.derived else None
    if storage.bound is not source.plan.bound or storage.kernel_dtype is not dtype or storage.buffer.numel() < source.plan.nbytes:
        raise DeclarationError(
            "a tied weight is declared to two different kernel formats",
            name=source.name,
            expected=f"the layout it has in {storage.label}",
            found=source.layout,
            remedy="Declare it once, or untie it with clone().",
        )
