"""Parsed lines, one after the other, for a shape and a dtype."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch

from ..errors import LayoutError
from .bound import BoundLayout
from .digits import BoundLine, bind_line
from .nibbles import NibbleLayout
from .pattern import Line
from .strided import StridedLayout


def sizes_of(shape: Sequence[int]) -> tuple[int, ...]:
    """``shape`` as plain integers. Raises LayoutError where it is none of a tensor."""
    try:
        sizes = tuple(map(operator.index, shape))
    except TypeError:
        sizes = (-1,)
    if any(size < 0 for size in sizes):
        raise LayoutError("this is no shape of a tensor", expected="sizes of 0 or more", found=repr(shape)[:80])
    return sizes


def spec_of(shape: Sequence[int], dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    """Both as they are of a tensor. Raises LayoutError where one is not."""
    if not isinstance(dtype, torch.dtype):
        raise LayoutError("a tensor has a torch.dtype", expected="a torch.dtype", found=repr(dtype)[:80])
    return sizes_of(shape), dtype


def core_dims(lines: Sequence[Line]) -> int:
    """How many of the last dims the lines order."""
    return len(lines[0].shape_side.dims)


def sized(lines: Sequence[Line], shape: Sequence[int]) -> list[BoundLine]:
    """The lines with the sizes that a tensor of ``shape`` gives them. Raises LayoutError where the digits do not fit."""
    dims = core_dims(lines)
    core = tuple(shape[len(shape) - dims :])
    if len(shape) < dims:
        text = " | ".join(map(str, lines))
        raise LayoutError(f"{text} takes {dims} dims", expected=f"{dims} or more dims", found=f"{list(shape)}")
    bound = []
    for line in lines:
        bound.append(bind_line(line, core))
        core = bound[-1].kernel_shape
    return bound


def bound(lines: Sequence[Line], bits: int | None, shape: tuple[int, ...], dtype: torch.dtype) -> BoundLayout:
    """The lines for tensors of the full ``shape``, whose elements they count; or nibbles, where ``bits`` is 4."""
    lead = len(shape) - core_dims(lines)
    if bits is None:
        return StridedLayout(sized(lines, shape), shape, lead, dtype)
    core = (*shape[max(lead, 0) : -1], shape[-1] * 2 * dtype.itemsize) if shape else ()
    return NibbleLayout(StridedLayout(sized(lines, core), core, 0, torch.uint8), shape, lead, dtype)
