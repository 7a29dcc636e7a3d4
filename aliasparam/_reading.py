"""Reading checkpoint values while the memory holds kernel format: a converted copy of what a view touches, and no more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from . import _convert
from ._regions import bytes_of, converted, regions_view
from ._states import State
from ._transform import contiguous_strides
from .errors import StateError

if TYPE_CHECKING:
    from ._bytes import StorageBytes


def converted_copy(storage: StorageBytes, view: Tensor, regions: range) -> Tensor:
    """Checkpoint values of ``view``: a copy of the same shape, strides and dtype."""
    if len(regions) == 1 and _convert.converts_by_bands(storage.plan):
        return _rows_copy(storage, view, regions[0])
    plan, first, count, capacity = storage.plan, regions[0], len(regions), storage.plan.region_capacity
    fresh, result = converted(plan, storage.buffer.device, first * capacity, count * capacity, view)
    core = plan.source.shape[plan.lead_dims :]
    width = plan.source.dtype.itemsize
    strides = (capacity // width, *contiguous_strides(core))
    typed = fresh.view(plan.source.dtype).as_strided((count, *core), strides, int(fresh.storage_offset()) // width)
    for start, n, state in storage.runs(regions):
        target = typed[start - first : start - first + n]
        if state is State.KERNEL:
            with whose(storage):
                _convert.to_checkpoint(plan, target, storage.kernel_regions(start, n), _convert.Progress())
        else:
            target.copy_(regions_view(plan, storage.checkpoint, start, n))
    return result


def _rows_copy(storage: StorageBytes, view: Tensor, region: int) -> Tensor:
    """The copy for a view of one large region: only the rows it touches take memory."""
    plan = storage.plan
    checkpoint = regions_view(plan, storage.checkpoint, region, 1)[0]
    row_bytes = checkpoint.shape[1] * checkpoint.element_size()
    begin = region * plan.region_capacity
    first, end = bytes_of(view)
    rows = range((first - begin) // row_bytes, -(-(end - begin) // row_bytes))
    fresh, result = converted(plan, storage.buffer.device, begin + rows.start * row_bytes, len(rows) * row_bytes, view)
    typed = fresh.view(plan.source.dtype).view(len(rows), checkpoint.shape[1])
    with whose(storage):
        _convert.rows_to_checkpoint(plan, checkpoint, storage.kernel_regions(region, 1)[0], rows, typed)
    return result


@contextmanager
def whose(storage: StorageBytes) -> Iterator[None]:
    """A transform without an inverse does not know whose bytes it refuses; we do."""
    try:
        yield
    except StateError as error:
        facts = {"expected": error.expected, "found": error.found, "remedy": error.remedy}
        raise StateError(error.message, label=storage.label, **facts) from None
