"""The new values of a staged reload, on the host until the commit.

Those for a GPU lie one after the other in chunks of pinned memory. The commit brings a chunk by one copy, and what is in it is
scattered from there on the device: it pays for each value what a write on the device costs, and the link is never idle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout.blocks import tiles
from ..layout.boxes import Box, sizes
from ..storage.scatter import STAGING_BYTES
from .targets import Target

#: Where values begin in a chunk: no layout wants more of an address.
_ALIGN = 256


class _Value(NamedTuple):
    """A rectangle of a tensor, and where in its chunk the values for it begin."""

    target: Target
    box: Box
    start: int

    def within(self, chunk: Tensor) -> Tensor:
        """The values, in their shape, in such memory."""
        live, shape = self.target.tensor, sizes(self.box)
        return chunk[self.start : self.start + math.prod(shape) * live.itemsize].view(live.dtype).view(shape)


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
        for piece in list(tiles(box, max(STAGING_BYTES // value.itemsize, 1))) or [box]:  # one of nothing is written too
            inside = tuple(slice(a - r, b - r) for (a, b), (r, _) in zip(piece, box, strict=True))
            part = value.detach()[inside]
            chunk = self._chunk(target.tensor.device, part.nbytes)
            placed = _Value(target, piece, chunk.used)
            placed.within(chunk.memory).copy_(part)
            chunk.used += -(-part.nbytes // _ALIGN) * _ALIGN
            chunk.values.append(placed)

    def _chunk(self, device: torch.device, nbytes: int) -> _Chunk:
        found = self._open.get(device)
        if found is None or found.used + nbytes > found.memory.numel():
            size = min(max(nbytes, self.nbytes), STAGING_BYTES)  # small for a small reload, and few
            memory = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
            found = self._open[device] = _Chunk(memory, device)
            self._chunks.append(found)
            self.nbytes += size
        return found

    @property
    def targets(self) -> Iterator[Target]:
        return (value.target for chunk in self._chunks for value in chunk.values)

    def __iter__(self) -> Iterator[tuple[Target, Box, Tensor]]:
        """Every value; of a GPU's tensor there, until the next is asked for. Scratch: a chunk on each GPU."""
        landings: dict[torch.device, Tensor] = {}
        for chunk in self._chunks:
            memory = chunk.memory
            if chunk.device.type == "cuda":
                if chunk.device not in landings:
                    landings[chunk.device] = torch.empty(STAGING_BYTES, dtype=torch.uint8, device=chunk.device)
                memory = landings[chunk.device]
                memory[: chunk.used].copy_(chunk.memory[: chunk.used], non_blocking=True)
            for value in chunk.values:
                yield value.target, value.box, value.within(memory)
