"""How a Parameter that was registered becomes the checkpoint name of a storage.

What cannot: tensors that overlap themselves or each other, or lie on several devices; views of storages that others declared.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from operator import itemgetter

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import DeclarationError
from ..layout.layout import bound_to
from ..spec import other_kind
from ..storage.states import State
from ..storage.storage import SCRATCH_BYTES, AliasedStorage
from ..tensors.faces import _Aliased, loader_attributes
from ..tensors.geometry import place_in
from ..tensors.parameter import AliasedParameter, make_parameter, take_over
from ..torch_private import is_alone, outside_inference
from .names import ModuleNames
from .planning import Source


def allocate(names: ModuleNames, source: Source, tensor: Tensor, *, loaded: bool) -> None:
    """Make ``tensor``, which is under the source's name, its checkpoint name: over a storage with its values, if they count.

    Its own memory is taken over where it is exactly the capacity and nobody else looks at it (no copy, no new address); what it
    holds is brought into kernel order by blocks. Memory that somebody else owns is never written: the storage gets its own.
    """
    if tensor.is_meta:
        source.attributes.update(loader_attributes(tensor))  # a loader will put a real tensor here: see adopt.py
        return
    if isinstance(tensor, AliasedParameter):  # a tied weight that was declared before
        check_tie(source, tensor)
        names.bind_storage(source, tensor._alias_storage, tensor)
        return
    memory = _memory_of(source, tensor)
    storage = _storage(names, source, tensor, memory, loaded=loaded)
    parameter = take_over(tensor, storage, storage.geometry)
    if parameter is None:  # the old object stays in somebody's hands, so its memory stays its own
        if memory is not None:
            memory, storage = None, _storage(names, source, tensor, None, loaded=loaded)
        parameter = make_parameter(storage, storage.geometry, type(tensor), loader_attributes(tensor))
    parameter.__dict__.update(source.attributes | parameter.__dict__)
    names.bind_storage(source, storage, parameter)
    if loaded and memory is not None:
        bound_to(None, *storage.spec).reorder(storage.elements, storage.bound, SCRATCH_BYTES)
        storage.states.put_all(State.LOADED)


def _memory_of(source: Source, tensor: Tensor) -> Tensor | None:
    """The tensor's own allocation as flat bytes, if it can become the storage's."""
    plan, memory = source.plan, tensor.untyped_storage()
    fits = memory.nbytes() == plan.nbytes == plan.source.nbytes and tensor.is_contiguous() and tensor.storage_offset() == 0
    if not fits or not is_alone(memory):
        return None
    with outside_inference():  # a tensor made in inference mode could not be written outside it
        return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(memory, 0, (plan.nbytes,), (1,))


def _storage(names: ModuleNames, source: Source, tensor: Tensor, memory: Tensor | None, *, loaded: bool) -> AliasedStorage:
    """A storage in ``memory``, INVALID until its values are in order; or in memory of its own, which has the tensor's values."""
    plan, state = source.plan, State.EMPTY
    if loaded and memory is not None:
        state = State.LOADED if plan.bound.is_identity else State.INVALID
    own = memory is None
    if memory is None:
        with outside_inference():
            memory = torch.zeros(plan.nbytes, dtype=torch.uint8, device=tensor.device)
    dtype = plan.kernel.dtype if source.derived else None
    storage = AliasedStorage(f"{names.label}.{source.name}", plan.source, source.layout, memory, state, dtype)
    if own and loaded:  # before it is shown: an interrupt loses no weights
        storage.write(storage.bound.whole, tensor.detach().to(storage.bound.dtype))
    return storage


def check_sources(names: ModuleNames, sources: Sequence[Source]) -> list[tuple[Source, Tensor]]:
    """Each source and its Parameter. Raises DeclarationError where they cannot each have a storage of their own."""
    beside: dict[str, Tensor] = {n: p for n, p in names.module._parameters.items() if p is not None and not is_lazy(p)}
    declared = {source.name: beside.pop(source.name) for source in sources}
    _check_memory(declared, beside)
    for source in sources:
        check_tie(source, declared[source.name])
    trained = sorted(name for name, parameter in declared.items() if parameter.requires_grad)
    if trained:  # their kernel bytes are no function of autograd
        warnings.warn(
            f"{type(names.module).__name__}: {', '.join(trained)} had requires_grad=True and will have no gradients: declared "
            "names are not trained. Register them with requires_grad=False, or train a tensor of your own and write it in.",
            UserWarning,
            stacklevel=4,
        )
    return [(source, declared[source.name]) for source in sources]


def check_tie(source: Source, parameter: Tensor) -> None:
    """Raise DeclarationError for a Parameter that another module declared, unless to the same format."""
    if not isinstance(parameter, _Aliased):
        return
    storage, plan = parameter._alias_storage, source.plan
    dtype = plan.kernel.dtype if source.derived else None
    whole = isinstance(parameter, AliasedParameter) and place_in(parameter._alias_geometry) == place_in(storage.geometry)
    alike = storage.bound is plan.bound and storage.kernel_dtype is dtype and storage.buffer.numel() >= plan.nbytes
    if not whole or not alike:
        raise DeclarationError(
            "a tied weight is declared to two different kernel formats" if whole else "a part of a tied weight is declared",
            name=source.name,
            expected=f"the whole of {storage.label}, and the layout it has there",
            found=source.layout if whole else f"a view of {storage.label}",
            remedy="Declare it once, and show parts of it with registry.show_shards(...); or untie it with clone().",
        )


def _check_memory(tensors: Mapping[str, Tensor], beside: Mapping[str, Tensor]) -> None:
    """Raise DeclarationError for sources which cannot each have a storage of their own.

    Args:
        tensors: declared sources by name; those on the meta device have no memory and pass.
        beside: other Parameters of the module. One that lies in a source's memory would lose it, unseen.
    """
    real = {name: t for name, t in tensors.items() if not t.is_meta and t.numel()}
    if len({t.device for t in real.values()}) > 1:
        raise DeclarationError(
            "the declared names are on several devices",
            expected="one device",
            found={name: str(t.device) for name, t in real.items()},
            remedy="Move the whole module first: module.to(device).",
        )
    for name, tensor in real.items():
        if overlaps_itself(tensor):
            raise DeclarationError(
                "elements of this tensor share memory (an expanded or overlapping view)",
                name=name,
                expected="every element in bytes of its own",
                found=f"shape {list(tensor.shape)}, strides {list(tensor.stride())}",
                remedy="Register tensor.contiguous() instead.",
            )
    objects = {id(t) for t in real.values()}  # the same object under a second name is a tie, which is kept
    others = {name: t for name, t in beside.items() if id(t) not in objects and has_memory(t)}
    spans = sorted((t.data_ptr(), t.data_ptr() + extent(t), name) for name, t in (real | others).items())
    every = declared = (0, 0, "")  # of the spans before: the one that ends last
    for span in spans:
        start, stop, name = span
        _, end, other = every if name in real else declared
        if start < end:
            raise DeclarationError(
                "two names overlap in memory",
                name=f"{other}, {name}",
                expected="tensors apart from each other",
                found=f"bytes {start} to {min(stop, end) - 1} in both",
                remedy="Declare the tensor which owns the memory and show parts of it: registry.show_shards(...).",
            )
        every = max(every, span, key=itemgetter(1))
        declared = span if name in real else declared


def has_memory(tensor: Tensor) -> bool:
    """Whether it has bytes at an address."""
    strided = other_kind(tensor) is None and not is_traceable_wrapper_subclass(tensor)
    return strided and not tensor.is_meta and tensor.numel() > 0


def extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return int((last + 1) * tensor.element_size())


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may share memory."""
    if tensor.is_contiguous():
        return False
    reach = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size > 1:
            if stride < reach:
                return True
            reach += (size - 1) * stride
    return False
