"""The delta of one tensor, decoded as far as it is asked for.

``xor``: the stream is as long as the tensor; new = old ^ stream. ``overwrite``: little-endian u32 count, count u32 byte
positions, count bytes. Both are one zstd frame. Whatever a frame says of itself, no more is decompressed than the tensor is
long, and memory is what was asked for, a piece and the frame's window (at most 128 MiB).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..host import HOST, host_bytes
from ..spec import TensorSpec
from .digest import optional
from .errors import DeltaError
from .header import Entry
from .held_file import memory_of

#: Bytes that are read or skipped at once, and positions.
PIECE = 1 << 20
_POSITIONS = 1 << 18
_MAX_WINDOW = 1 << 27
_HEAD = 18  # bytes of a frame's header, at most


class Change(NamedTuple):
    """What a delta makes of bytes that lie together.

    Attributes:
        values: uint8 [n].
        positions: int64 [n], ascending, where they belong; None: they are as many as the bytes, new = old ^ values.
    """

    values: Tensor
    positions: Tensor | None

    def of(self, old: Tensor) -> Tensor:
        """The new bytes (uint8 [n], on the device of ``old``), in memory of their own."""
        values = self.values.to(old.device)
        if self.positions is None:
            return old ^ values
        return old.index_put((self.positions.to(old.device),), values)


class Xor:
    """The changes of a tensor, which are stored as ``entry``. Errors name ``name``.

    Raises:
        DeltaError: the frame says that it is of another length.
    """

    def __init__(self, entry: Entry, spec: TensorSpec, name: str) -> None:
        self._stream = _Stream(entry, name)
        self._at, self._nbytes, self._expected = 0, spec.nbytes, f"{spec.nbytes} bytes, as the tensor has"
        if self._stream.size not in (None, self._nbytes):
            raise DeltaError(
                "the delta is of a tensor of another dtype or shape",
                name=name,
                expected=f"{self._expected} ({spec})",
                found=f"{self._stream.size} bytes, {self._stream.size / max(spec.numel, 1):g} for each element",
            )

    def read(self, start: int, stop: int) -> Change | None:
        """What changes of bytes ``start`` to ``stop``, behind those that were asked for before; None where nothing does.

        Raises:
            DeltaError: not zstd, truncated, or positions that are not ascending and within the tensor. What was read before may
                have been applied; the digest is what decides.
        """
        self._stream.skip(start - self._at, self._expected)
        values = host_bytes(stop - start)
        self._stream.fill(values, self._expected)
        self._at = stop
        return Change(values, None) if values.any() else None

    def finish(self) -> None:
        """Nobody asks for more, as the rest is of parts that are elsewhere, or nothing.

        Raises:
            DeltaError: as :meth:`read`, or longer or shorter than the tensor asks for.
        """
        self._stream.skip(self._nbytes - self._at, self._expected)
        self._stream.end(self._expected)


class Overwrite:
    """As :class:`Xor`.

    Attributes:
        count: positions in all.
        blocks: (values, byte positions in the tensor) of all that changes, ascending, up to 2**18 at once, and what :meth:`read`
            takes from. At its end it raises as :meth:`finish`.
    """

    def __init__(self, entry: Entry, spec: TensorSpec, name: str) -> None:
        nbytes = spec.nbytes
        places, values = _Stream(entry, name), _Stream(entry, name)
        self.count = int(places.numbers(1, "a count of 4 bytes"))
        if self.count > nbytes:
            expected = f"at most {nbytes}"
            raise DeltaError("more positions than the tensor has bytes", name=name, expected=expected, found=str(self.count))
        self.blocks = _blocks(places, values, self.count, nbytes, name)
        self._ahead = host_bytes(0), torch.empty(0, dtype=torch.int64, device=HOST)  # values, positions

    def read(self, start: int, stop: int) -> Change | None:
        found = [self._take(start, stop)]
        while not len(self._ahead[0]) and (block := next(self.blocks, None)) is not None:
            self._ahead = block
            found.append(self._take(start, stop))
        values, positions = (torch.cat(parts) for parts in zip(*found, strict=True))
        return Change(values, positions - start) if len(positions) else None

    def finish(self) -> None:
        for _ in self.blocks:
            pass

    def _take(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """(values, positions) of those that were read ahead; what is before ``start`` is of parts that are elsewhere."""
        values, positions = self._ahead
        first, last = torch.searchsorted(positions, torch.tensor([start, stop], device=HOST)).tolist()
        self._ahead = values[last:], positions[last:]
        return values[first:last], positions[first:last]


def _blocks(places: _Stream, values: _Stream, count: int, nbytes: int, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Values come after all positions, so the stream is read twice, side by side."""
    expected, last = f"{4 + 5 * count} bytes for {count} positions", -1
    values.skip(4 + 4 * count, expected)
    for first in range(0, count, _POSITIONS):
        at = places.numbers(min(count - first, _POSITIONS), expected)
        if int(at.max()) >= nbytes:
            raise DeltaError("a position outside the tensor", name=name, expected=f"below {nbytes}", found=str(int(at.max())))
        if int(at[0]) <= last or bool((at[1:] <= at[:-1]).any()):
            raise DeltaError("positions are not ascending", name=name, expected="every position once, in order")
        new, last = host_bytes(len(at)), int(at[-1])
        values.fill(new, expected)
        yield new, at
    values.end(expected)


#: Encoding -> what decodes it.
ENCODINGS: dict[str, type[Xor] | type[Overwrite]] = {"xor": Xor, "overwrite": Overwrite}


class _Stream:
    """Decompressed bytes of a stored tensor, on demand.

    Attributes:
        size: how many there are, if the frame says it.
    """

    def __init__(self, entry: Entry, name: str) -> None:
        zstd = optional("zstandard")
        self._error: type[Exception] = zstd.ZstdError
        self._name = name
        head = entry.file.read(entry.begin, min(_HEAD, entry.nbytes))
        try:
            self.size = None if (size := zstd.frame_content_size(head)) < 0 else size
        except zstd.ZstdError:
            self.size = None  # the decompressor will say what it is
        decompressor = zstd.ZstdDecompressor(max_window_size=_MAX_WINDOW)
        self._reader: Any = decompressor.stream_reader(_Compressed(entry), read_size=1 << 16)

    def fill(self, out: Tensor, expected: str) -> None:
        """The next bytes into ``out`` (uint8 [n])."""
        memory = memory_of(out)
        while memory:
            count = self._ask(self._reader.readinto, memory)
            if count == 0:
                raise self._too_short(expected)
            memory = memory[count:]

    def numbers(self, count: int, expected: str) -> Tensor:
        """The next ``count`` u32 as int64 [count]."""
        raw = host_bytes(4 * count)
        self.fill(raw, expected)
        return raw.view(torch.uint32).to(torch.int64)

    def skip(self, count: int, expected: str) -> None:
        end = self._reader.tell() + count
        if count and self._ask(self._reader.seek, end) != end:
            raise self._too_short(expected)

    def end(self, expected: str) -> None:
        if self._ask(self._reader.read, 1):
            raise DeltaError("the delta is too long", name=self._name, expected=expected, found="more")

    def _too_short(self, expected: str) -> DeltaError:
        return DeltaError("the delta is too short", name=self._name, expected=expected, found=f"{self._reader.tell()} bytes")

    def _ask(self, do: Callable[[Any], Any], what: object) -> Any:
        try:
            return do(what)
        except self._error as error:
            raise DeltaError(f"the delta cannot be decompressed: {error}", name=self._name) from None


class _Compressed:
    """The stored bytes, as the decompressor asks for them."""

    def __init__(self, entry: Entry) -> None:
        self._entry, self._at = entry, 0

    def read(self, count: int) -> bytes:
        data = self._entry.file.read(self._entry.begin + self._at, min(count, self._entry.nbytes - self._at))
        self._at += len(data)
        return data
