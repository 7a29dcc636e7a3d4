"""The bytes of one live tensor in checkpoint coordinates: a declared name in kernel order, or a plain parameter or buffer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..layout.bound import flat_bytes
from ..layout.boxes import Box, row_major, tiles, whole
from ..storage.storage import AliasedStorage
from ..tensors.faces import _Aliased
from ..tensors.geometry import place_of
from ..torch_private import writes_counted
from .digest import sums_of_run


class Live:
    """A view of ``tensor``; it holds no bytes.

    Attributes:
        tensor: a declared name (also a shard of a fused one), or a plain tensor.
        storage: where a declared name lies; None for a plain tensor.
        nbytes: of the values, without padding.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.storage: AliasedStorage | None = tensor._alias_storage if isinstance(tensor, _Aliased) else None
        self.shape, self.dtype, self.device = tuple(tensor.shape), tensor.dtype, tensor.device
        self.nbytes = tensor.numel() * tensor.element_size()

    @property
    def version(self) -> int:
        """Changes whenever the bytes do, by whoever; but torch counts no writes of inference tensors."""
        if self.storage is not None:
            self.storage.notice()
            return self.storage.version
        return writes_counted(self.tensor)

    def pieces(self, max_bytes: int) -> Iterator[tuple[int, Tensor]]:
        """(first checkpoint byte, :meth:`bytes`) of runs that lie together in the checkpoint, in order."""
        strides, size = row_major(self.shape), self.dtype.itemsize
        for box in tiles(self.box, max(max_bytes // size, 1)):
            yield sum(a * stride for (a, _), stride in zip(box, strides, strict=True)) * size, self.bytes(box)

    def bytes(self, box: Box) -> Tensor:
        """The checkpoint bytes of ``box``, uint8 [n], on the tensor's device. Of a plain tensor possibly its own memory.

        Raises:
            StateError: elements that hold no weights.
        """
        part = self.part(box)
        with torch.no_grad():
            values = part._snapshot() if isinstance(part, _Aliased) else part.detach()
            return flat_bytes(values)

    def positional_sums(self) -> Tensor | None:
        """int64 ``[2]``: the two sums of adler32 over all bytes, taken where they lie; None where they must be gathered.

        Raises:
            StateError: elements that hold no weights.
        """
        if self.storage is None:
            if self.tensor.is_cpu or not _lies_as_it_reads(self.tensor) or not self.nbytes:
                return None
            return sums_of_run(flat_bytes(self.tensor.detach()))
        place = place_of(self.storage, self.tensor._alias_geometry)  # type: ignore[attr-defined]
        if place is None or place.order is not None or self.dtype is not self.storage.bound.dtype:
            return None
        with self.storage.lock:
            self.storage.need_readable(place.box)
            return self.storage.bound.positional_sums(self.storage.elements, place.box)

    def part(self, box: Box) -> Tensor:
        """The name's own values under ``box``: what is copied into it is written."""
        return part_of(self.tensor, box)

    def under(self, box: Box | None) -> Live:
        """The same of a rectangle; of the whole tensor where it is None."""
        return self if box is None else Live(self.part(box))

    @contextmanager
    def writing(self) -> Iterator[Tensor]:
        """All bytes as they lie, uint8 [n], to change some of them, at :meth:`positions`, in a tensor that holds weights. After a
        failure a declared name is INVALID."""
        if self.storage is None:
            yield flat_bytes(self.tensor.detach())
            return
        with self.storage.lock:
            self.storage.before_write()
            begun = self.storage.states.begin(self.storage.bound.whole)
            yield self.storage.elements.view(torch.uint8)
            self.storage.states.rollback(begun)

    def bytes_at(self, places: Tensor) -> Tensor:
        """The bytes at ``places`` in memory (int64 [n], on the tensor's device; see :meth:`positions`), uint8 [n].

        Raises:
            StateError: elements that hold no weights.
        """
        if self.storage is None:
            return flat_bytes(self.tensor.detach())[places]
        place = place_of(self.storage, self.tensor._alias_geometry)  # type: ignore[attr-defined]
        with self.storage.lock:
            self.storage.need_readable(self.storage.bound.whole if place is None else place.box)
            return self.storage.elements.view(torch.uint8)[places]

    def positions(self, at: Tensor) -> Tensor | None:
        """Checkpoint byte positions ``at`` (int64 [n]) as positions in memory; None where bytes have no places of their own."""
        if self.storage is None:
            return at if _lies_as_it_reads(self.tensor) else None
        geometry, bound = self.tensor._alias_geometry, self.storage.bound  # type: ignore[attr-defined]
        if not _lies_as_it_reads(geometry) or geometry.dtype is not bound.dtype:
            return None
        size, first = bound.dtype.itemsize, geometry.storage_offset() - self.storage.geometry.storage_offset()
        found = bound.positions(at + first if size == 1 else at // size + first)
        return found if found is None or size == 1 else found * size + at % size

    @property
    def box(self) -> Box:
        return whole(self.shape)


def part_of(tensor: Tensor, box: Box) -> Tensor:
    """A view of a tensor: its values under ``box``."""
    for dim, ((start, stop), extent) in enumerate(zip(box, tensor.shape, strict=True)):
        if (start, stop) != (0, extent):
            tensor = tensor.narrow(dim, start, stop - start)
    return tensor


def _lies_as_it_reads(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
