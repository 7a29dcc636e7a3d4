"""Whether a derived tensor can live in its source's storage, and why.

Pure: looks at specs only, allocates nothing, so a plan can be made on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum

from ._transform import TensorSpec, Transform, round_up


class Reason(Enum):
    """Why a pair aliases or falls back to a copy.

    ``reason.code`` is stable and meant for programs; the value is the text that users see.
    """

    SAME = "same shape and dtype"
    SAME_BYTES = "same bytes under another shape or same-width dtype"
    PADDED = "kernel format is larger by declared padding: one padded capacity"
    ELEMENT_WIDTH = "element widths differ"
    BROADCAST = "kernel format is a broadcast of the source, or the source of it"
    SMALLER = "kernel format is smaller than the checkpoint format (a reduction, not a layout)"
    LOSSY = "the transform loses information: the source is kept"
    OTHER_DEVICE = "on another device than its source"
    UNDECLARED_SHAPE = "value of another shape or dtype from undeclared code"
    OWN_MEMORY = "the derived name has memory of its own already, and no address moves"
    SWITCHED_OFF = "aliasing is switched off"

    @property
    def aliases(self) -> bool:
        return self in (Reason.SAME, Reason.SAME_BYTES, Reason.PADDED)

    @property
    def code(self) -> str:
        """``same``, ``same-bytes``, ``padded``, ``element-width``, …"""
        return self.name.lower().replace("_", "-")


_switched_on: ContextVar[bool] = ContextVar("aliasing", default=True)


def aliasing_is_on() -> bool:
    """False inside :func:`without_aliasing`."""
    return _switched_on.get()


@contextmanager
def without_aliasing() -> Iterator[None]:
    """Inside the block declarations give every kernel name memory of its own, as ``declare(..., aliasing=False)`` does.

    Results must be the same (law 7). For code that calls ``declare`` or the ported helpers itself.
    """
    token = _switched_on.set(False)
    try:
        yield
    finally:
        _switched_on.reset(token)


@dataclass(frozen=True, slots=True)
class StoragePlan:
    """Geometry of one storage: both formats, and the regions which convert independently.

    ``[Note: regions lie apart]`` A region owns ``region_capacity`` consecutive bytes, enough for either format. Inside it
    each format starts at byte 0 and is contiguous. So an unpadded tensor is contiguous as a whole, and with padding the
    checkpoint name of a 3-D stack is strided over its leading dimensions only: an expert never spills into its neighbour.
    """

    source: TensorSpec
    derived: TensorSpec
    transform: Transform
    regions: int
    region_capacity: int
    reason: Reason

    @property
    def nbytes(self) -> int:
        return self.regions * self.region_capacity

    @property
    def lead_dims(self) -> int:
        """Leading dimensions which index regions (0: the whole tensor is one region)."""
        return _lead_dims(self.source, self.transform)


def judge(source: TensorSpec, derived: TensorSpec, transform: Transform) -> Reason:
    """The compatibility verdict for one pair, from what both formats look like."""
    if not transform.lossless:
        return Reason.LOSSY
    if source.dtype.itemsize != derived.dtype.itemsize:
        return Reason.ELEMENT_WIDTH
    if derived.nbytes < source.nbytes:
        return Reason.BROADCAST if _broadcasts(derived.shape, source.shape) else Reason.SMALLER
    if derived.nbytes > source.nbytes:
        return Reason.PADDED if transform.pads or not _broadcasts(source.shape, derived.shape) else Reason.BROADCAST
    return Reason.SAME if source == derived else Reason.SAME_BYTES


def _broadcasts(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    """Whether ``small`` broadcasts to ``large``: every trailing dim is equal or 1, and at least one is 1 or absent."""
    if len(small) > len(large):
        return False
    return all(a in (b, 1) for a, b in zip(reversed(small), reversed(large), strict=False))


def plan_storage(
    source: TensorSpec, transform: Transform, *, aliasing: bool = True, room_for: tuple[Transform, ...] = ()
) -> StoragePlan:
    """Plan the storage of a source and its kernel format, with room for other kernel formats it may be moved to.

    Where the verdict is a copy, the returned plan still describes the kernel format, and its capacity is the source's
    alone: the copy gets storage of its own.
    """
    derived = transform.output_spec(source)
    if aliasing or transform.is_identity_for(source):
        reason = judge(source, derived, transform)
    else:
        reason = Reason.SWITCHED_OFF
    regions = math.prod(source.shape[: _lead_dims(source, transform)])
    per_region = max(regions, 1)
    size = source.nbytes // per_region
    if reason.aliases:
        size = max(size, derived.nbytes // per_region, *(t.output_spec(source).nbytes // per_region for t in room_for))
    # Both formats are read through typed views from the region's first byte.
    size = round_up(size, math.lcm(source.dtype.itemsize, derived.dtype.itemsize))
    return StoragePlan(source, derived, transform, regions, size, reason)


def _lead_dims(source: TensorSpec, transform: Transform) -> int:
    if transform.core_dims == 0:
        return 0
    return max(len(source.shape) - transform.core_dims, 0)
