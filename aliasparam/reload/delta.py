"""The delta of one tensor, decoded in bounded pieces.

``xor``: the stream is as long as the tensor; new = old ^ stream. ``overwrite``: little-endian u32 count, count u32 byte
positions, count bytes. Both are one zstd frame. Whatever a frame says of itself, no more is decompressed than the tensor is
long, and memory is two pieces and the frame's window (at most 128 MiB).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .errors import DeltaError
from .hashers import optional
from .held_file import memory_of

ENCODINGS = ("xor", "overwrite")
#: Bytes of a tensor whose changes come as one piece.
PIECE = 1 << 20
_MAX_WINDOW = 1 << 27


class Change(NamedTuple):
    """What a delta makes of some bytes of a tensor: of ``xor`` a run, of ``overwrite`` bytes anywhere.

    Attributes:
        start, stop: the first byte, and behind the last.
        values: uint8 [n], valid until the next piece.
        positions: int64 [n], ascending: new[positions] = values. None: new[start:stop] = old[start:stop] ^ values.
    """

    start: int
    stop: int
    values: Tensor
    positions: Tensor | None

    def cut(self, at: int) -> tuple[Change, Change]:
        """What is before byte ``at``, between ``start`` and ``stop``, and what is not."""
        if self.positions is None:
            values = self.values[: at - self.start], self.values[at - self.start :]
            return Change(self.start, at, values[0], None), Change(at, self.stop, values[1], None)
        count = int(torch.searchsorted(self.positions, at))
        before, behind = self.positions[:count], self.positions[count:]
        return (
            Change(self.start, at, self.values[:count], before),
            Change(int(behind[0]), self.stop, self.values[count:], behind),
        )

    def apply_(self, flat: Tensor, begin: int = 0) -> None:
        """To the tensor's bytes from ``begin`` on (uint8 [n], checkpoint order), in place."""
        if self.positions is None:
            flat[self.start - begin : self.stop - begin] ^= self.values.to(flat.device)
        else:
            flat[(self.positions - begin).to(flat.device)] = self.values.to(flat.device)

    def scattered(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(positions int64 [m], values uint8 [m]) of those bytes alone that change, on ``device``."""
        values = self.values.to(device)
        if self.positions is not None:
            return self.positions.to(device), values
        where = values.nonzero().view(-1)
        return where + self.start, values[where]

    def of(self, old: Tensor, values: Tensor) -> Tensor:
        """The new bytes where there were ``old`` ones."""
        return old ^ values if self.positions is None else values


class Readable(Protocol):
    """A stream of compressed bytes."""

    def read(self, count: int = -1, /) -> bytes: ...


def decode(
    encoding: str, compressed: Callable[[], Readable], nbytes: int, name: str, piece_bytes: int | None = None
) -> Iterator[Change]:
    """The changes of a tensor of ``nbytes`` bytes, in order. Runs in which nothing changes are left out.

    Args:
        compressed: opens the stream from its begin (twice for ``overwrite``, whose values come after all positions).
        piece_bytes: :data:`PIECE`.

    Raises:
        DeltaError: not zstd, truncated, longer or shorter than the tensor asks for, or positions that are not ascending
            and within the tensor. What was yielded before may have been applied; the digest is what decides.
    """
    piece_bytes = PIECE if piece_bytes is None else piece_bytes
    if encoding == "xor":
        return _xor_runs(_Stream(compressed(), name), nbytes, piece_bytes)
    if encoding == "overwrite":
        return _overwrites(compressed, nbytes, name, max(1, piece_bytes // 4))
    raise DeltaError("unknown delta_encoding", name=name, expected=" or ".join(ENCODINGS), found=repr(encoding)[:80])


def _xor_runs(stream: _Stream, nbytes: int, piece_bytes: int) -> Iterator[Change]:
    buffer = torch.empty(min(piece_bytes, nbytes), dtype=torch.uint8)
    for start in range(0, nbytes, piece_bytes):
        piece = buffer[: min(piece_bytes, nbytes - start)]
        stream.fill(piece, f"{nbytes} bytes, as the tensor has")
        if piece.any():
            yield Change(start, start + piece.numel(), piece, None)
    stream.end(f"{nbytes} bytes, as the tensor has")


def _overwrites(compressed: Callable[[], Readable], nbytes: int, name: str, step: int) -> Iterator[Change]:
    places, values = _Stream(compressed(), name), _Stream(compressed(), name)
    count = int(places.numbers(1, "a count of 4 bytes"))
    expected = f"{4 + 5 * count} bytes for {count} positions"
    if count > nbytes:
        raise DeltaError("more positions than the tensor has bytes", name=name, expected=f"at most {nbytes}", found=str(count))
    values.skip(4 + 4 * count, expected)
    last = -1
    for first in range(0, count, step):
        size = min(step, count - first)
        positions = places.numbers(size, expected)
        _check_positions(positions, last, nbytes, name)
        last = int(positions[-1])
        changed = torch.empty(size, dtype=torch.uint8)
        values.fill(changed, expected)
        yield Change(int(positions[0]), last + 1, changed, positions)
    values.end(expected)


def _check_positions(positions: Tensor, last: int, nbytes: int, name: str) -> None:
    if int(positions.max()) >= nbytes:
        raise DeltaError("a position outside the tensor", name=name, expected=f"below {nbytes}", found=str(int(positions.max())))
    if int(positions[0]) <= last or bool((positions[1:] <= positions[:-1]).any()):
        raise DeltaError("positions are not ascending", name=name, expected="every position once, in order")


class _Stream:
    """Decompressed bytes, on demand."""

    def __init__(self, source: Readable, name: str) -> None:
        zstd = optional("zstandard")
        self._error: type[Exception] = zstd.ZstdError
        self._name, self._count = name, 0
        self._reader: Any = zstd.ZstdDecompressor(max_window_size=_MAX_WINDOW).stream_reader(source, read_size=1 << 16)

    def fill(self, out: Tensor, expected: str) -> None:
        """The next bytes into ``out`` (uint8 [n])."""
        memory, done = memory_of(out), 0
        while done < len(memory):
            count = self._read_into(memory[done:])
            if count == 0:
                raise DeltaError("the delta is too short", name=self._name, expected=expected, found=f"{self._count} bytes")
            done += count

    def numbers(self, count: int, expected: str) -> Tensor:
        """The next ``count`` u32 as int64 [count]."""
        raw = torch.empty(4 * count, dtype=torch.uint8)
        self.fill(raw, expected)
        if sys.byteorder == "big":
            raw = raw.view(-1, 4).flip(1).reshape(-1)
        return raw.view(torch.int32).to(torch.int64) & 0xFFFFFFFF

    def skip(self, count: int, expected: str) -> None:
        scratch = torch.empty(min(count, PIECE), dtype=torch.uint8)
        for start in range(0, count, PIECE):
            self.fill(scratch[: min(PIECE, count - start)], expected)

    def end(self, expected: str) -> None:
        if self._read_into(memoryview(bytearray(1))):
            raise DeltaError("the delta is too long", name=self._name, expected=expected, found="more")

    def _read_into(self, memory: memoryview) -> int:
        try:
            count = int(self._reader.readinto(memory))
        except self._error as error:
            raise DeltaError(f"the delta cannot be decompressed: {error}", name=self._name) from None
        self._count += count
        return count
