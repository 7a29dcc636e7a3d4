"""Memory that cannot be declared: tensors that overlap themselves or each other, or lie on several devices."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from torch import Tensor

from .errors import DeclarationError


def check_memory(label: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise DeclarationError for sources which cannot each have a storage of their own.

    Args:
        label: the module, for messages.
        tensors: declared sources by name; those on the meta device have no memory and pass.
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
    ranges = sorted((t.data_ptr(), t.data_ptr() + _extent(t), name) for name, t in real.items())
    for (_, end, first), (start, _, second) in pairwise(ranges):
        if start < end and real[first] is not real[second]:
            raise DeclarationError(
                "two declared names overlap in memory",
                module=label,
                name=f"{first}, {second}",
                expected="tensors apart from each other",
                remedy="Declare the tensor which owns the memory and show parts of it: registry.show_shards(...).",
            )


def _extent(tensor: Tensor) -> int:
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
