"""One write transaction over any number of storages: tell, mark, scatter, count.

1. whoever shows a kernel name of these storages, or derives from them, is told and refuses;
2. the regions under all parts are INVALID;
3. values are scattered into kernel order, those from another device or dtype in pieces;
4. what has arrived is counted, and the regions are what they were or better.

An error before 2 has changed nothing. An interrupt after it leaves regions that refuse until they are written whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .coverage import Box
from .guarded import GuardedMemory
from .scatter import landable, scatter


class Part(NamedTuple):
    """Values for one box.

    Attributes:
        storage: where they go.
        box: in checkpoint coordinates.
        value: of the box's shape, on any device and of any dtype that ``copy_`` takes.
        arrived: the boxes that count as written where that is not ``box``: values beside them are what was there.
    """

    storage: GuardedMemory
    box: Box
    value: Tensor
    arrived: Sequence[Box] | None = None


def write_all(parts: Sequence[Part], non_blocking: bool = False) -> None:
    """Write all parts, or none, or leave what was begun refusing. The caller holds the locks of all, and takes no gradient.

    Args:
        parts: where two of one storage overlap, the last is right.
        non_blocking: as of ``Tensor.copy_``.

    Raises:
        StateError: a storage is exposed to an outside writer. Nothing has changed then.
        RuntimeError: torch's own, for a value that it cannot copy. Nothing has changed then.
    """
    for part in parts:
        part.storage.need_writable()
    parts = [part._replace(value=landable(part.value, part.storage.elements)) for part in parts]
    for part in parts:
        part.storage.changing()
    begun = [(part.storage, part.storage.states.begin(part.box)) for part in parts]
    for part in parts:
        scatter(part.storage.bound, part.storage.elements, part.box, part.value, non_blocking)
    for storage, before in reversed(begun):  # the first of two parts of one storage knows what it was before both
        storage.states.rollback(before)
    for part in parts:
        states = part.storage.states
        for box in [part.box] if part.arrived is None else part.arrived:
            states.arrived(box, states.begin(box))
