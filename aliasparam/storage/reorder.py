"""Bringing memory from one order into another, in place and in pieces."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import BoundLayout
from ..layout.bind import Bindable, bound_to
from .storage import AliasedStorage

#: Values that are out of place at a time, where the two orders can be cut that fine.
SCRATCH_BYTES = 16 << 20


def move(storage: AliasedStorage, layout: Bindable | None) -> None:
    """Bring ``storage`` into another order. It is INVALID until its bytes are in place. The caller holds the lock."""
    before = storage.states.begin(storage.bound.whole)
    reorder(storage.elements, storage.bound, bound_to(layout, storage.spec.shape, storage.spec.dtype))
    storage.rebind(layout)
    storage.states.rollback(before)


def reorder(memory: Tensor, old: BoundLayout, new: BoundLayout) -> None:
    """Move every element of ``memory`` (flat) from its place under ``old`` to that under ``new``; padding becomes zero.

    Orders of one capacity keep blocks together, and a block is read before it is written: scratch is one block. Else a region at
    a time is out of place; regions that grow move from the last on, so that none is overwritten unread.
    """
    if old is new or (old.is_identity and new.is_identity):
        return
    same_size = old.regions * old.region_capacity == new.regions * new.region_capacity
    if same_size and (old.lead == new.lead or not (_padded(old) or _padded(new))):
        for block in old.in_place_blocks(new, SCRATCH_BYTES):
            values = [(box, old.read(memory, box)) for box in block]
            for box, value in values:
                new.write(memory, box, value)
        new.clear_padding(memory)
        return
    if old.lead != new.lead:
        everything = old.read(memory, old.whole)
        memory.zero_()
        new.write(memory, old.whole, everything)
        return
    boxes = list(enumerate(old.region_boxes()))
    for region, box in reversed(boxes) if new.region_capacity > old.region_capacity else boxes:
        value = old.read(memory, box)
        _bytes(memory[region * old.region_capacity : (region + 1) * old.region_capacity]).zero_()
        _bytes(memory[region * new.region_capacity : (region + 1) * new.region_capacity]).zero_()
        new.write(memory, box, value)


def _padded(bound: BoundLayout) -> bool:
    return bound.region_capacity != bound.region_elements


def _bytes(memory: Tensor) -> Tensor:
    return memory.view(torch.uint8)
