"""Reading and writing through views of a checkpoint name.

A checkpoint name looks like a plain contiguous tensor, its *geometry*. Views are made by torch itself on that geometry, so
every chain of them is right. Slices and permutations are one box each (storage/place.py). Whatever else there is (steps,
``unfold``, ``as_strided``, another element width, conj and neg bits) goes through a plain copy of the rows it lies in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..host import HOST
from ..layout.boxes import row_major, sizes, whole
from ..storage.coverage import Box
from ..storage.place import Place, placed
from ..storage.storage import AliasedStorage
from ..storage.transaction import Part
from .call import Aliased


def place_of(storage: AliasedStorage, view: Tensor) -> Place | None:
    """The box that ``view``, a view of the storage's geometry, is; None where it is none."""
    spec = storage.bound
    if view.dtype.itemsize != spec.dtype.itemsize or view.is_conj() or view.is_neg():
        return None
    return placed(spec.shape, view.storage_offset(), view.shape, view.stride())


def read_view(storage: AliasedStorage, view: Tensor) -> Tensor:
    """Checkpoint values of ``view``: the view itself where the layout is the identity, else a gathered copy.

    Raises:
        StateError: elements that never arrived, are invalid, or are being written from outside.
    """
    place = place_of(storage, view)
    if place is not None and not storage.bound.is_identity:
        value = place.to_view(storage.gather(place.box))
        return value if view.dtype is storage.bound.dtype else value.view(view.dtype)
    with storage.lock:
        rows = place.box if place is not None else rows_under(storage, view)
        exact = place is None and storage.states.missing  # no box is under a view of no elements
        for box in boxes_under(storage, view, rows, touched=True) if exact else [rows]:
            storage.need_readable(box)
        if storage.bound.is_identity:
            return view
        return as_view(storage, storage.bound.read(storage.elements, rows), rows, view)


def parts_of(storage: AliasedStorage, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Part]:
    """What writing values, each of its view's shape, through views asks of the storage; where views overlap the last is right.
    The caller holds the lock."""
    places = [place_of(storage, view) for view, _ in pairs]
    if None not in places:
        return [_boxed(storage, *pair, place) for pair, place in zip(pairs, places, strict=True) if place is not None]
    storage.need_writable()  # and what it finds out about the memory counts below
    rows = rows_under(storage, pairs[0][0] if len(pairs) == 1 else storage.geometry)
    patched = storage.bound.read(storage.elements, rows)
    for view, value in pairs:
        as_view(storage, patched, rows, view).copy_(value)
    if not storage.states.missing:
        return [Part(storage, rows, patched)]
    return [
        Part(storage, rows, patched, [box for view, _ in pairs for box in boxes_under(storage, view, rows_under(storage, view))])
    ]


def _boxed(storage: AliasedStorage, view: Tensor, value: Tensor, place: Place) -> Part:
    if view.dtype is not storage.bound.dtype:  # of the same width; without the bits that a view of another dtype cannot have
        if value.dtype is not view.dtype or value.device != view.device or value.is_conj() or value.is_neg():
            value = torch.empty(value.shape, dtype=view.dtype, device=view.device).copy_(value)
        value = value.view(storage.bound.dtype)
    return Part(storage, place.box, place.to_box(value))


def once(view: Tensor) -> Tensor:
    """A view of the same elements, each listed once where ``view`` is expanded."""
    for dim, (size, step) in enumerate(zip(view.shape, view.stride(), strict=True)):
        if size > 1 and step == 0 and view.numel():
            view = view.narrow(dim, 0, 1)
    return view


def rows_under(storage: AliasedStorage, view: Tensor) -> Box:
    """The smallest range of leading indices, whole in all other dims, which holds every element of ``view``."""
    shape = storage.bound.shape
    if not view.numel() or not shape:
        return tuple((0, n if view.numel() else 0) for n in shape)
    width = view.element_size()
    reach = sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True)) + 1
    first = view.storage_offset() * width
    last = first + reach * width - 1
    step, box = math.prod(shape) * storage.bound.dtype.itemsize, list[tuple[int, int]]()
    for size in shape:
        step //= size
        start, stop = first // step, last // step + 1
        while start * step % width:
            start -= 1  # wider elements begin where they are aligned
        box.append((start, stop))
        if start + 1 < stop or step % width:
            break
        first, last = first % step, last % step  # all in one index of this dim: look inside it
    return (*box, *whole(shape[len(box) :]))


def as_view(storage: AliasedStorage, rows: Tensor, box: Box, view: Tensor) -> Tensor:
    """The view of ``rows``, a contiguous copy of what lies under ``box``, that ``view`` is of the tensor."""
    raw = rows.reshape(-1).view(torch.uint8)
    offset = view.storage_offset() - _first_byte(storage, box) // view.element_size()
    width = view.element_size()  # what is left over at the end is less than one element
    seen = raw[: raw.numel() // width * width].view(view.dtype).as_strided(view.shape, view.stride(), offset)
    return _with_bits(seen, conj=view.is_conj(), neg=view.is_neg())


def boxes_under(storage: AliasedStorage, view: Tensor, rows: Box, *, touched: bool = False) -> list[Box]:
    """Boxes that are exactly the elements under a view of any kind: those with all their bytes, or ``touched`` at all."""
    if not view.numel() or not storage.bound.shape:
        return [rows] if view.numel() else []
    width, size = storage.bound.dtype.itemsize, view.element_size()
    shape = sizes(rows)
    seen = torch.zeros(math.prod(shape) * width, dtype=torch.bool, device=HOST)
    first = view.storage_offset() * size - _first_byte(storage, rows)
    seen.as_strided((*view.shape, size), (*(s * size for s in view.stride()), 1), first).fill_(True)
    by_element = seen.view(-1, width)
    under = (by_element.any(-1) if touched else by_element.all(-1)).view(shape)
    edges = torch.diff(torch.nn.functional.pad(under, (1, 1)).to(torch.int8))
    starts, stops = (edges == 1).nonzero().tolist(), (edges == -1).nonzero().tolist()
    ends = [(start, [*(i + 1 for i in start[:-1]), stop[-1]]) for start, stop in zip(starts, stops, strict=True)]
    return [tuple((low + i, low + j) for (low, _), i, j in zip(rows, *pair, strict=True)) for pair in ends]


def _first_byte(storage: AliasedStorage, box: Box) -> int:
    steps = row_major(storage.bound.shape)
    return sum(start * step for (start, _), step in zip(box, steps, strict=True)) * storage.bound.dtype.itemsize


def is_same_view(first: Aliased, second: Aliased) -> bool:
    """Whether two names are the same view of one storage."""
    same_storage = first._alias_storage is second._alias_storage
    return same_storage and place_in(first._alias_geometry) == place_in(second._alias_geometry)


def same_view(storage: AliasedStorage, geometry: Tensor) -> Tensor:
    """The view of ``storage`` which ``geometry`` is of another storage of the same shape."""
    return view_at(storage, place_in(geometry))


class Placed(NamedTuple):
    """Where a view lies, whatever storage it is of, and the bits that it has."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    conj: bool
    neg: bool


def place_in(view: Tensor) -> Placed:
    return Placed(view.dtype, tuple(view.shape), view.stride(), int(view.storage_offset()), view.is_conj(), view.is_neg())


def view_at(storage: AliasedStorage, place: Placed) -> Tensor:
    whole = storage.geometry if place.dtype.itemsize == storage.bound.dtype.itemsize else storage.buffer
    seen = whole.view(place.dtype).as_strided(place.shape, place.strides, place.offset)
    return _with_bits(seen, conj=place.conj, neg=place.neg)


def _with_bits(view: Tensor, *, conj: bool, neg: bool) -> Tensor:
    view = torch._neg_view(view) if neg else view
    return view.conj() if conj else view
