"""Converting bytes between two formats in the memory they share, with a bounded scratch.

The scratch bound holds for what a transform allocates too: a piece is a quarter of the bound, because a transform's result and
its own temporaries live beside each other. A region that cannot be cut (see [Note: bands] in _transform.py) is one piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ._transform import Band, TensorSpec
from ._verdict import StoragePlan

#: Scratch bytes of a conversion, results and temporaries together.
SCRATCH_BYTES = 16 << 20
_PIECE_BYTES = SCRATCH_BYTES // 4


def regions_at_once(plan: StoragePlan) -> int:
    """How many regions are converted in one step."""
    return max(1, _PIECE_BYTES // max(plan.region_capacity, 1))


def scratch_bytes(plan: StoragePlan) -> int:
    """What converting ``plan`` may allocate at most: the bound, or more where one uncuttable region is larger."""
    largest = plan.region_capacity if _band(plan) is None else 0
    return max(SCRATCH_BYTES, 4 * largest)


@dataclass
class Progress:
    """How far a conversion came: once it wrote, its regions hold both formats until it is through."""

    wrote: bool = False


def to_kernel(plan: StoragePlan, checkpoint: Tensor, kernel: Tensor, progress: Progress) -> None:
    """Convert regions in place.

    Args:
        plan: geometry.
        checkpoint: ``[n, *core]`` checkpoint-format view of n regions.
        kernel: ``[n, *core']`` kernel-format view of the same memory.
        progress: told before the first byte changes.
    """
    pieces = list(_pieces(plan, checkpoint, kernel))
    # Kernel format is never smaller, so its k-th piece reaches into later checkpoint pieces: the last one goes first.
    for source, target in reversed(pieces):
        _overwrite(target, plan.transform.forward(source), progress)


def to_checkpoint(plan: StoragePlan, checkpoint: Tensor, kernel: Tensor, progress: Progress) -> None:
    """Convert regions back, in place or into other memory. Arguments as in :func:`to_kernel`."""
    for target, source in _pieces(plan, checkpoint, kernel):
        _overwrite(target, plan.transform.inverse(source, TensorSpec.of(target)), progress)


def converts_by_bands(plan: StoragePlan) -> bool:
    """Whether a region is large enough to be converted piece by piece, and can be."""
    return plan.region_capacity > _PIECE_BYTES and _band(plan) is not None


def rows_to_checkpoint(plan: StoragePlan, checkpoint: Tensor, kernel: Tensor, rows: range, target: Tensor) -> None:
    """Checkpoint values of some rows of one region, into ``target`` ``[len(rows), columns]``.

    Args:
        plan: geometry, of regions for which :func:`converts_by_bands` holds.
        checkpoint: ``[rows, columns]`` checkpoint-format view of the region, of which only the geometry counts.
        kernel: ``[*core']`` kernel-format view of the region.
        rows: the rows that are wanted.
        target: where they go.
    """
    for piece, source in _pieces(plan, checkpoint[None], kernel[None]):
        first, column = divmod(int(piece.storage_offset() - checkpoint.storage_offset()), checkpoint.stride(0))
        begin, end = max(first, rows.start), min(first + piece.shape[0], rows.stop)
        if begin < end:
            values = plan.transform.inverse(source, TensorSpec.of(piece))
            part = target[begin - rows.start : end - rows.start, column : column + piece.shape[1]]
            part.copy_(values[begin - first : end - first])


def _pieces(plan: StoragePlan, checkpoint: Tensor, kernel: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(checkpoint view, kernel view) of slices that convert by themselves."""
    band = _band(plan)
    if band is None or plan.region_capacity <= _PIECE_BYTES:
        yield checkpoint, kernel
        return
    for region in range(checkpoint.shape[0]):
        cut = _columns if band.dim == -1 else _rows
        yield from cut(band.size, checkpoint[region], kernel[region])


def _columns(size: int, checkpoint: Tensor, kernel: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    step = _whole_bands(size, checkpoint.shape[-1], checkpoint.nbytes)
    for first in range(0, checkpoint.shape[-1], step):
        yield checkpoint[..., first : first + step], kernel[..., first : first + step]


def _rows(size: int, checkpoint: Tensor, kernel: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = checkpoint.shape[-2]
    bands = -(-rows // size)
    step = _whole_bands(size, rows, kernel.nbytes)
    # The k-th band's kernel bytes are the k-th equal part, in whatever shape that format gives a band of rows.
    part = kernel.numel() // bands
    for first in range(0, rows, step):
        source = checkpoint[..., first : first + step, :]
        count = -(-source.shape[-2] // size)
        offset = kernel.storage_offset() + part * (first // size)
        shape = _share(tuple(kernel.shape), count, bands)
        strides = kernel.stride()
        yield source, kernel.as_strided(shape, strides, offset)


def _share(shape: tuple[int, ...], count: int, bands: int) -> tuple[int, ...]:
    """Kernel shape of ``count`` of ``bands`` bands: its first core dim is divided among them."""
    return (shape[0] * count // bands, *shape[1:])


def _whole_bands(size: int, extent: int, nbytes: int) -> int:
    """Rows (or columns) of the largest piece which is a multiple of ``size`` and within the bound."""
    per_band = max(nbytes * size // max(extent, 1), 1)
    return size * max(1, _PIECE_BYTES // per_band)


def _band(plan: StoragePlan) -> Band | None:
    core_source, core_derived = plan.source.shape[plan.lead_dims :], plan.derived.shape[plan.lead_dims :]
    if len(core_source) != 2 or not core_derived:
        return None
    band = plan.transform.band(TensorSpec(core_source, plan.source.dtype))
    if band is None:
        return None
    if band.dim == -1:
        return band if core_source == core_derived else None
    bands = -(-core_source[0] // band.size)
    return band if core_derived[0] % bands == 0 else None


def _overwrite(target: Tensor, value: Tensor, progress: Progress) -> None:
    if value.untyped_storage().data_ptr() == target.untyped_storage().data_ptr():
        if value.data_ptr() == target.data_ptr() and value.stride() == target.stride():
            return  # identity: the bytes are where they belong
        value = value.clone()  # a transform that returned another view of its input
    progress.wrote = True
    target.copy_(value)
