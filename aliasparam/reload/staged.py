"""The new values of a staged reload, on the host until the commit.

They lie one after the other in chunks, pinned where they are for a GPU. The commit brings a chunk there by one copy while values
of the one before are scattered: it pays for each value what a write on the device costs, and the link is never idle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout.blocks import tiles
from ..layout.boxes import Box, row_major, sizes
from .targets import Target

#: Bytes of host memory that are brought at once, and of each of two buffers on a GPU.
CHUNK = 16 << 20
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


@dataclass
class _Chunk:
    """Host memory, uint8 [n], the device that it is for, and what it holds."""

    memory: Tensor
    device: torch.device
    values: list[_Value] = field(default_factory=list)
    used: int = 0


class StagedValues:
    """Copies of values on the host, in the order of arrival for each device.

    Attributes:
        nbytes: host memory.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._chunks: list[_Chunk] = []
        self._open: dict[torch.device, _Chunk] = {}

    def add(self, target: Target, box: Box, value: Tensor) -> None:
        """Copy ``value``, of the box's shape and the tensor's dtype."""
        for piece in list(tiles(box, max(CHUNK // value.itemsize, 1))) or [box]:  # one of nothing is written too
            inside = tuple(slice(a - r, b - r) for (a, b), (r, _) in zip(piece, box, strict=True))
            part = value.detach()[inside]
            chunk = self._chunk(target.tensor.device, part.nbytes)
            placed = _Value(target, piece, chunk.used)
            placed.within(chunk.memory).copy_(part)
            chunk.used += _aligned(part.nbytes)
            chunk.values.append(placed)

    def _chunk(self, device: torch.device, nbytes: int) -> _Chunk:
        found = self._open.get(device)
        if found is None or found.used + nbytes > found.memory.numel():
            size = min(max(_aligned(nbytes), self.nbytes), CHUNK)  # small for a small reload, and few
            memory = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
            found = self._open[device] = _Chunk(memory, device)
            self._chunks.append(found)
            self.nbytes += size
        return found

    @property
    def targets(self) -> Iterator[Target]:
        return (value.target for chunk in self._chunks for value in chunk.values)

    def __iter__(self) -> Iterator[tuple[Target, Box, Tensor]]:
        """Every value; of a GPU's tensor there, until the next is asked for. Scratch: two chunks on each GPU."""
        uploads: dict[torch.device, _Upload] = {}
        for chunk in self._chunks:
            memory = chunk.memory
            if chunk.device.type == "cuda":
                if chunk.device not in uploads:
                    uploads[chunk.device] = _Upload(chunk.device)
                memory = uploads[chunk.device].bring(memory[: chunk.used])
            for value in chunk.values:
                yield value.target, value.box, value.within(memory)


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
