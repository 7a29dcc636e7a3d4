"""The new values of a staged reload, on the host until the commit.

They lie one after the other in chunks, pinned where they are for a GPU. The commit brings a chunk there by one copy while values
of the one before are scattered: it pays for each value what a write on the device costs, and the link is never idle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..host import host_bytes
from ..layout.blocks import tiles
from ..layout.boxes import Box, part_in, row_major, sizes
from .targets import Target

#: Bytes of host memory that are brought at once, and of each of two buffers on a GPU.
CHUNK = 16 << 20
#: Rows of a piece are a multiple of this, if there are so many.
_ROWS = 128
#: Where values begin in a chunk: no layout wants more of an address.
_ALIGN = 256


class _Value(NamedTuple):
    """A rectangle of a tensor, and where in its chunk the values for it begin."""

    target: Target
    box: Box
    start: int

    def within(self, chunk: Tensor) -> Tensor:
        """The values, in their shape, in such memory."""
        dtype, shape = self.target.tensor.dtype, sizes(self.box)
        return chunk.view(dtype).as_strided(shape, row_major(shape), self.start // dtype.itemsize)


@dataclass(eq=False)
class _Chunk:
    """Host memory, uint8 [n], the device that it is for, and how much of it is taken."""

    memory: Tensor
    device: torch.device
    used: int = 0

    @property
    def room(self) -> int:
        """Bytes that are left."""
        return self.memory.numel() - self.used


class StagedValues:
    """Copies of values on the host, in the order of arrival for each device.

    Attributes:
        nbytes: host memory: at most twice that of the values, 3/2 where they are alike, and a chunk for each device.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._values: list[tuple[_Chunk, _Value]] = []
        self._open: dict[torch.device, _Chunk] = {}

    def add(self, target: Target, box: Box, value: Tensor) -> None:
        """Copy ``value``, of the box's shape and the tensor's dtype. One that cannot be copied whole is not there at all."""
        placed = list[tuple[_Chunk, _Value]]()
        for piece in list(tiles(box, _elements(sizes(box), value.itemsize))) or [box]:  # one of nothing is written too
            part = value.detach()[part_in(piece, box)]
            chunk = self._chunk(target.tensor.device, part.nbytes)
            placed.append((chunk, _Value(target, piece, chunk.used)))
            placed[-1][1].within(chunk.memory).copy_(part)
            chunk.used += _aligned(part.nbytes)
        self._values += placed

    def _chunk(self, device: torch.device, nbytes: int) -> _Chunk:
        """One that has room for so many bytes: its own for a piece that would leave much of one empty."""
        if nbytes > CHUNK // 2:
            return self._new(device, _aligned(nbytes))
        found = self._open.get(device)
        if found is None or found.room < nbytes:
            size = min(max(_aligned(nbytes), self.nbytes), CHUNK)  # small for a small reload, and few
            found = self._open[device] = self._new(device, size)
        return found

    def _new(self, device: torch.device, size: int) -> _Chunk:
        memory = host_bytes(size, pinned=device.type == "cuda")
        self.nbytes += size
        return _Chunk(memory, device)

    @property
    def targets(self) -> Iterator[Target]:
        return (value.target for _, value in self._values)

    def __iter__(self) -> Iterator[tuple[Target, Box, Tensor]]:
        """Every value; of a GPU's tensor there, until the next is asked for. Scratch: two chunks on each GPU."""
        uploads: dict[torch.device, _Upload] = {}
        held: dict[_Chunk, list[_Value]] = {}
        for chunk, value in self._values:
            held.setdefault(chunk, []).append(value)
        for chunk, values in held.items():
            memory = chunk.memory
            if chunk.device.type == "cuda":
                if chunk.device not in uploads:
                    uploads[chunk.device] = _Upload(chunk.device)
                memory = uploads[chunk.device].bring(memory[: chunk.used])
            for value in values:
                yield value.target, value.box, value.within(memory)


def _elements(shape: tuple[int, ...], itemsize: int) -> int:
    """Of each piece of a value: at most a chunk, in whole tiles of every layout, so that pieces of tensors which are alike are
    alike and no kernel is compiled for each."""
    most = max(CHUNK // itemsize, 1)
    for dim in range(len(shape)):
        row = math.prod(shape[dim + 1 :])
        if row and (fits := most // row):
            return (fits - fits % _ROWS if fits > _ROWS else fits) * row
    return most


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


class _Upload:
    """Pinned memory on its way to a GPU, by a stream of its own and through two buffers in turn."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers = [torch.empty(CHUNK, dtype=torch.uint8, device=device) for _ in range(2)]
        self._read = torch.cuda.current_stream(device).record_event()

    def bring(self, pinned: Tensor) -> Tensor:
        """The same bytes on the device, for the current stream, until the next but one are brought."""
        buffer, current = self._buffers.pop(0), torch.cuda.current_stream(self._device)
        self._buffers.append(buffer)
        self._stream.wait_event(self._read)  # the buffer, two calls ago
        self._read = current.record_event()
        with torch.cuda.stream(self._stream):
            buffer[: pinned.numel()].copy_(pinned, non_blocking=True)
        current.wait_stream(self._stream)
        return buffer
