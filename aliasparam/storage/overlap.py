"""Memory that cannot be declared: tensors that overlap themselves or each other, or lie on several devices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

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
    real = _real(tensors)
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
    for first, second in _overlaps([_Range.of(n, t, True) for n, t in real.items()] + _ranges_beside(real, beside)):
        raise DeclarationError(
            "two names overlap in memory",
            module=label,
            name=f"{first.name}, {second.name}",
            expected="tensors apart from each other",
            found=f"bytes {second.start} to {min(first.end, second.end) - 1} in both",
            remedy="Declare the tensor which owns the memory and show parts of it: registry.show_shards(...).",
        )


class _Range(NamedTuple):
    start: int
    end: int
    name: str
    declared: bool

    @classmethod
    def of(cls, name: str, tensor: Tensor, declared: bool) -> _Range:
        return cls(tensor.data_ptr(), tensor.data_ptr() + extent(tensor), name, declared)


def _real(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if t.device.type != "meta" and t.numel()}


def _ranges_beside(real: Mapping[str, Tensor], beside: Mapping[str, Tensor]) -> list[_Range]:
    objects = {id(t) for t in real.values()}  # the same object under a second name is a tie, which is kept
    return [_Range.of(n, t, False) for n, t in _real(beside).items() if id(t) not in objects and has_memory(t)]


def has_memory(tensor: Tensor) -> bool:
    """Whether it has bytes at an address."""
    strided = other_kind(tensor) is None and not is_traceable_wrapper_subclass(tensor)
    return strided and tensor.device.type != "meta" and tensor.numel() > 0


def _overlaps(ranges: list[_Range]) -> Iterator[tuple[_Range, _Range]]:
    """Pairs with bytes in common, of which one at least is declared."""
    furthest: dict[bool, _Range] = {}
    for current in sorted(ranges):
        for declared, earlier in furthest.items():
            if current.start < earlier.end and (declared or current.declared):
                yield earlier, current
        kept = furthest.get(current.declared)
        if kept is None or current.end > kept.end:
            furthest[current.declared] = current


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
