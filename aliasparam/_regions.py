"""Where the regions of a storage lie, and which of them a view touches or covers. Pure: looks at no bytes.

A *view* here is a plain view of the checkpoint name: of any dtype, shape and strides, counted from the buffer's first byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._overlap import overlaps_itself
from ._transform import TensorSpec, contiguous_strides
from ._verdict import StoragePlan


def name_over(buffer: Tensor, plan: StoragePlan, spec: TensorSpec) -> Tensor:
    """The plain tensor of one format over the buffer. See [Note: regions lie apart] in _verdict.py."""
    strides = contiguous_strides(spec.shape)
    step = plan.region_capacity // spec.dtype.itemsize
    for dim in reversed(range(plan.lead_dims)):
        strides[dim] = step
        step *= spec.shape[dim]
    return buffer.view(spec.dtype).as_strided(spec.shape, strides)


def regions_view(plan: StoragePlan, name: Tensor, first: int, count: int) -> Tensor:
    """``count`` regions of one name as [count, *core]."""
    lead = plan.lead_dims
    step = plan.region_capacity // name.element_size()
    return name.as_strided((count, *name.shape[lead:]), (step, *name.stride()[lead:]), first * step)


def bytes_of(view: Tensor) -> tuple[int, int]:
    """(first byte, byte after the last) of a view that is not empty."""
    width = view.element_size()
    first = int(view.storage_offset()) * width
    if view.is_contiguous():
        return first, first + view.numel() * width
    last = sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True))
    return first, first + (last + 1) * width


def regions_of(plan: StoragePlan, view: Tensor) -> range:
    """The regions which a view touches."""
    if view.numel() == 0:
        return range(0)
    if plan.regions == 1:
        return range(1)
    first, end = bytes_of(view)
    return range(first // plan.region_capacity, (end - 1) // plan.region_capacity + 1)


def covered(plan: StoragePlan, core: int, view: Tensor) -> tuple[range, bool]:
    """The regions which a view touches, and whether it surely holds every checkpoint byte of them (False where that is not
    plain to see). A region has ``core`` checkpoint bytes."""
    if view.numel() == 0:
        return range(0), False
    first, end = bytes_of(view)
    capacity = plan.region_capacity
    regions = range(first // capacity, (end - 1) // capacity + 1)
    count = len(regions)
    if view.nbytes != core * count:
        return regions, False
    begin = regions.start * capacity
    if count > 1 and core != capacity:
        return regions, _is_stack(plan, core, view, begin)
    # As many bytes as the range holds, none twice, none before or after it.
    in_range = begin <= first and end <= begin + capacity * (count - 1) + core
    return regions, in_range and (view.is_contiguous() or not overlaps_itself(view))


def _is_stack(plan: StoragePlan, core: int, view: Tensor, begin: int) -> bool:
    """Whether ``view`` is whole padded regions one after the other, as the checkpoint name itself."""
    # From the inside out: dims that make up one region without gaps, then dims that count regions.
    filled, step = view.element_size(), plan.region_capacity
    for size, stride in sorted(zip(view.shape, view.stride(), strict=True), key=lambda pair: pair[1]):
        if size == 1:
            continue
        if filled < core:
            if stride * view.element_size() != filled:
                return False
            filled *= size
        else:
            if stride * view.element_size() != step:
                return False
            step *= size
    return filled == core and view.storage_offset() * view.element_size() == begin


def same_view(buffer: Tensor, memory: Tensor) -> Tensor:
    """The view of ``buffer`` which ``memory`` is of another buffer of the same plan."""
    return buffer.view(memory.dtype).as_strided(memory.shape, memory.stride(), memory.storage_offset())


def converted(plan: StoragePlan, device: torch.device, first: int, nbytes: int, view: Tensor) -> tuple[Tensor, Tensor]:
    """Fresh bytes for ``[first, first + nbytes)`` of the buffer, and the view of them that ``view`` is of the buffer.

    Elements of a wider dtype may begin before a region does, so the copy begins where ``view``'s dtype is aligned.
    """
    width = view.element_size()
    lead = first % width
    fresh = torch.empty(lead + nbytes, dtype=torch.uint8, device=device)
    result = torch.empty(0, dtype=view.dtype, device=device)
    offset = view.storage_offset() - (first - lead) // width
    return fresh[lead:], result.set_(fresh.untyped_storage(), offset, view.shape, view.stride())
