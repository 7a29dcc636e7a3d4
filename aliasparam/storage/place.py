"""Which box of a tensor a view of it is.

Views are made by torch itself on a plain contiguous tensor; what one covers is found from its offset, shape and strides. Slices
and permutations are one box each.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from ..layout.boxes import row_major, sizes
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
    over = [(stride, dim) for dim, (size, stride) in enumerate(zip(shape, strides, strict=True)) if size > 1]
    dims = dict(over)  # of the view, by what one step is in the tensor
    box, order = [], []
    for step, size in zip(row_major(base), base, strict=True):
        start, offset = divmod(offset, step) if size > 1 else (0, offset)
        dim = dims.pop(step, None) if size > 1 else None
        order += [] if dim is None else [dim]
        box.append((start, start + (1 if dim is None else shape[dim])))  # an index was taken, or a range
    if offset or dims or len(order) < len(over) or any(stop > size for (_, stop), size in zip(box, base, strict=True)):
        return None
    if order == sorted(order):
        return Place(tuple(box), sizes(tuple(box)), None, shape)
    order += [dim for dim in range(len(shape)) if dim not in order]  # dims of one element lie anywhere
    return Place(tuple(box), sizes(tuple(box)), tuple(order), tuple(shape[dim] for dim in order))
