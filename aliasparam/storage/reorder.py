"""Bringing memory from one order into another, in place and in pieces."""

from __future__ import annotations

from torch import Tensor

from ..layout import BoundLayout, Box
from ..layout.layout import Order, bound_to
from .storage import AliasedStorage

#: Values that are out of place at a time, where the two orders can be cut that fine.
SCRATCH_BYTES = 16 << 20


def move(storage: AliasedStorage, layout: Order | None) -> None:
    """Bring ``storage`` into another order. It is INVALID until its bytes are in place. The caller holds the lock."""
    before = storage.states.begin(storage.bound.whole)
    reorder(storage.elements, storage.bound, bound_to(layout, storage.spec.shape, storage.spec.dtype))
    storage.rebind(layout)
    storage.states.rollback(before)


def reorder(memory: Tensor, old: BoundLayout, new: BoundLayout) -> None:
    """Move every element of ``memory`` (flat) from its place under ``old`` to that under ``new``; padding becomes zero.

    A block is read before it is written: scratch is one block, and a region where ``new`` pads. See ``in_place_blocks``.
    """
    if old is new or (old.is_identity and new.is_identity):
        return
    for block in old.in_place_blocks(new, SCRATCH_BYTES):
        _move(memory, block, old, new)
    new.clear_padding(memory)


def _move(memory: Tensor, block: list[Box], old: BoundLayout, new: BoundLayout) -> None:
    for box, value in [(box, old.read(memory, box)) for box in block]:
        new.write(memory, box, value)
