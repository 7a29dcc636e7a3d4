"""Which box of a tensor a view of it is.

Views are made by torch itself on a plain contiguous tensor; what one covers is found from its offset, shape and strides. Slices
and permutations are one box each.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from ..layout.boxes import row_major
from .coverage import Box


class Place(NamedTuple):
    """A view which is one box of the tensor.

    Attributes:
        box: (start, stop) for each dim of the tensor.
        shape: the box's sizes.
        order: for each dim of the box that the view has, the view's dim; None where they are in order.
        squeezed: the box's shape without the dims which the view does not have.
    """

    box: Box
    shape: tuple[int, ...]
    order: tuple[int, ...] | None
    squeezed: tuple[int, ...]

    def to_box(self, value: Tensor) -> Tensor:
        """A value of the view's shape in the box's."""
        value = value if self.order is None else value.permute(self.order)
        return value if value.shape == self.shape else value.view(self.shape)

    def to_view(self, value: Tensor) -> Tensor:
        """A value of the box's shape in the view's."""
        value = value.view(self.squeezed)
        return value if self.order is None else value.permute(sorted(range(len(self.order)), key=self.order.__getitem__))


@lru_cache(maxsize=1 << 16)
def placed(base: tuple[int, ...], offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Place | None:
    if not all(shape):
        return Place(tuple((0, 0) for _ in base), (0,) * len(base), None, shape) if base else None
    steps = row_major(base)
    starts, left = [], offset
    for step, size in zip(steps, base, strict=True):
        starts.append(left // step if size > 1 else 0)
        left -= starts[-1] * step
    found = _match(base, steps, shape, strides)
    if left or found is None:
        return None
    sizes = [shape[v] if v is not None else 1 for v in found]
    if any(start + size > limit for start, size, limit in zip(starts, sizes, base, strict=True)):
        return None
    order = tuple(v for v in found if v is not None)
    ones = [v for v, n in enumerate(shape) if n == 1 and v not in order]  # dims of one element lie anywhere: first
    order = (*ones, *order)
    box = tuple((start, start + size) for start, size in zip(starts, sizes, strict=True))
    in_order = order == tuple(range(len(shape)))
    return Place(box, tuple(sizes), None if in_order else order, tuple(shape[v] for v in order))


def _match(base: tuple[int, ...], steps: list[int], shape: tuple[int, ...], strides: tuple[int, ...]) -> list[int | None] | None:
    """For each dim of the tensor, the view's dim over it (None: an index was taken); None where a dim is over none."""
    found: list[int | None] = [None] * len(base)
    for dim, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        if size == 1:
            continue
        at = next((b for b, step in enumerate(steps) if step == stride and base[b] > 1 and found[b] is None), None)
        if at is None:
            return None
        found[at] = dim
    return found
