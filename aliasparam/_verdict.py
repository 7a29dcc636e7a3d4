"""Whether a derived tensor can live in its source's storage, and why.

Pure: looks at specs only, allocates nothing, so a plan can be made on the meta device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from ._transform import TensorSpec, Transform, round_up


class Reason(Enum):
    """Why a pair aliases or falls back to a copy. The value is the text that users see."""

    SAME = "same shape and dtype"
    SAME_BYTES = "same bytes under another shape or same-width dtype"
    PADDED = "kernel format is larger by declared padding: one padded capacity"
    ELEMENT_WIDTH = "element widths differ"
    SMALLER = "kernel format is smaller than the checkpoint format (a broadcast or a reduction, not a layout)"
    SWITCHED_OFF = "aliasing is switched off"

    @property
    def aliases(self) -> bool:
        return self in (Reason.SAME, Reason.SAME_BYTES, Reason.PADDED)


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


def judge(source: TensorSpec, derived: TensorSpec) -> Reason:
    """The compatibility verdict for one pair."""
    if source.dtype.itemsize != derived.dtype.itemsize:
        return Reason.ELEMENT_WIDTH
    if derived.nbytes < source.nbytes:
        return Reason.SMALLER
    if derived.nbytes > source.nbytes:
        return Reason.PADDED
    return Reason.SAME if source == derived else Reason.SAME_BYTES


def plan_storage(source: TensorSpec, transform: Transform, *, aliasing: bool = True) -> StoragePlan:
    """Plan the storage of a source and its kernel format.

    Where the verdict is a copy, the returned plan still describes the kernel format, and its capacity is the source's
    alone: the copy gets storage of its own.
    """
    derived = transform.output_spec(source)
    reason = judge(source, derived) if aliasing or transform.is_identity_for(source) else Reason.SWITCHED_OFF
    regions = math.prod(source.shape[: _lead_dims(source, transform)])
    per_region = max(regions, 1)
    size = source.nbytes // per_region
    if reason.aliases:
        size = max(size, derived.nbytes // per_region)
    # Both formats are read through typed views from the region's first byte.
    size = round_up(size, math.lcm(source.dtype.itemsize, derived.dtype.itemsize))
    return StoragePlan(source, derived, transform, regions, size, reason)


def _lead_dims(source: TensorSpec, transform: Transform) -> int:
    if transform.is_identity_for(source):
        return 0
    return max(len(source.shape) - transform.core_dims, 0)
