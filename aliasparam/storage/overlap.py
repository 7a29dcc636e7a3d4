"""Memory that cannot be declared: tensors that overlap themselves or each other, or lie on several devices."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import DeclarationError
from ..spec import other_kind


def check_memory(label: str, tensors: Mapping[str, Tensor], beside: Mapping[str, Tensor]) -> None:
    """Raise DeclarationError for sources which cannot each have a storage of their own.

    Args:
        label: the module, for messages.
        tensors: declared sources by name; those on the meta device have no memory and pass.
        beside: other Parameters of the module. One that lies in a source's memory would lose it, unseen.
    """
    real = {name: t for name, t in tensors.items() if t.device.type != "meta" and t.numel()}
    devices = {str(t.device) for t in real.values()}
    if len(devices) > 1:
        raise DeclarationError(
            "the declared names are on several devices",
            module=label,
            expected="one device",
            found={name: str(t.device) for name, t in real.items()},
            remedy="Move the whole module first: module.to(device).",
        )
    for name, tensor in real.items():
        if overlaps_itself(tensor):
            raise DeclarationError(
                "elements of this tensor share memory (an expanded or overlapping view)",
                module=label,
                name=name,
                expected="every element in bytes of its own",
                found=f"shape {list(tensor.shape)}, strides {list(tensor.stride())}",
                remedy="Register tensor.contiguous() instead.",
            )
    objects = {id(t) for t in real.values()}  # the same object under a second name is a tie, which is kept
    others = {name: t for name, t in beside.items() if id(t) not in objects and has_memory(t)}
    every = [(t.data_ptr(), t.data_ptr() + extent(t), name, of is real) for of in (real, others) for name, t in of.items()]
    furthest: dict[bool, tuple[int, str]] = {}  # of what is declared, and of what is not: where one ends
    for start, end, name, declared in sorted(every):
        for known, (stop, other) in furthest.items():
            if start < stop and (known or declared):
                raise DeclarationError(
                    "two names overlap in memory",
                    module=label,
                    name=f"{other}, {name}",
                    expected="tensors apart from each other",
                    found=f"bytes {start} to {min(stop, end) - 1} in both",
                    remedy="Declare the tensor which owns the memory and show parts of it: registry.show_shards(...).",
                )
        furthest[declared] = max(furthest.get(declared, (0, "")), (end, name))


def has_memory(tensor: Tensor) -> bool:
    """Whether it has bytes at an address."""
    strided = other_kind(tensor) is None and not is_traceable_wrapper_subclass(tensor)
    return strided and tensor.device.type != "meta" and tensor.numel() > 0


def extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return int((last + 1) * tensor.element_size())


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may share memory."""
    reach = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size > 1:
            if stride < reach:
                return True
            reach += (size - 1) * stride
    return False
