"""Bytes from one rank to another over ``torch.distributed``, each within a deadline.

Frames of a weight stream: one message of JSON before each bucket of bytes, and one at the end. Nothing is unpickled.

A message is SHA-256 (hex) of its text and the text, padded with spaces: of one size, so that a receiver never asks for more.

| frame | fields |
|---|---|
| ``bucket`` | ``number``; ``bytes`` that follow, their ``checksum`` and ``digest``; ``tensors``: fields of each :class:`Part` |
| ``end`` | ``buckets``: how many there were |
| ``gave up`` | ``why`` |
| ``taken``, ``refused`` | the receiver's answers: ``number`` of the frame, from 0; ``why`` |
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..layout.boxes import Box
from .errors import SourceError, StreamError
from .header import DTYPES, can_be, is_sizes, parse_json
from .held_file import memory_of

#: Bytes of a message: the parts of a bucket are as many as fit, with as many characters of JSON.
MESSAGE_BYTES = 64 << 10
_SEAL = 64
TEXT_BYTES = MESSAGE_BYTES - _SEAL - 512
AGAIN = "Send all weights again, after the cause is mended."
#: Where a part begins in its bucket: a multiple of the widest element.
ALIGNMENT = 16

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Part(NamedTuple):
    """Values in a bucket: a whole tensor, or the box of it that begins at ``start``; ``offset`` in bytes."""

    name: str
    dtype: torch.dtype
    sizes: tuple[int, ...]
    start: tuple[int, ...] | None = None
    offset: int = 0

    @property
    def box(self) -> Box | None:
        return None if self.start is None else tuple((at, at + n) for at, n in zip(self.start, self.sizes, strict=True))

    def behind(self, end: int) -> Part:
        """In the place behind a part that ends there: places follow from sizes, and are not sent."""
        return self._replace(offset=-(-end // ALIGNMENT) * ALIGNMENT)

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    @property
    def nbytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize

    def of(self, memory: Tensor) -> Tensor:
        """Its values in the bucket's memory, uint8 [n]."""
        return memory[self.offset : self.end].view(self.dtype).view(self.sizes)

    def fields(self) -> list[Any]:
        """
        Raises:
            StreamError: a dtype that files have no name for.
        """
        if self.dtype not in _NAMES:
            raise StreamError("tensors of this dtype are not sent", name=self.name, expected=", ".join(DTYPES), found=self.dtype)
        return [self.name, _NAMES[self.dtype], self.sizes, self.start]


def encode(fields: dict[str, Any]) -> Tensor:
    """uint8 [MESSAGE_BYTES]. The caller has seen to it that it fits."""
    text = json.dumps(fields, separators=(",", ":")).encode()
    message = hashlib.sha256(text).hexdigest().encode() + text
    return torch.frombuffer(bytearray(message.ljust(MESSAGE_BYTES)), dtype=torch.uint8)


def decode(message: Tensor, where: str) -> dict[str, Any]:
    """
    Args:
        message: uint8 [n], on the host.
        where: it is from.

    Raises:
        StreamError: damaged, or no JSON.
    """
    raw = bytes(memory_of(message)).rstrip(b" ")
    if hashlib.sha256(raw[_SEAL:]).hexdigest().encode() != raw[:_SEAL]:
        raise StreamError("a message of the stream is damaged", name=where, expected="text with its SHA-256 before it")
    try:
        return parse_json(raw[_SEAL:], where)
    except SourceError as error:
        raise StreamError(error.message, name=where) from None


def parts_of(fields: dict[str, Any], where: str) -> list[Part]:
    """The parts of a bucket frame, every one inside its ``bytes``.

    Raises:
        StreamError: a field is not what it should be.
    """
    entries, end, parts = fields.get("tensors"), 0, []
    for entry in entries if isinstance(entries, list) else [None]:
        part = _part(entry)
        if part is None or (part := part.behind(end)).end > fields["bytes"]:
            expected = "name, dtype, sizes and start, within the bucket"
            raise StreamError("a bucket's entry is not one", name=where, expected=expected, found=repr(entry)[:80])
        parts.append(part)
        end = part.end
    return parts


def _part(entry: Any) -> Part | None:
    match entry:
        case [str(name), str(kind), sizes, start] if kind in DTYPES and is_sizes(sizes) and can_be(sizes):
            if start is None or (is_sizes(start) and len(start) == len(sizes)):
                return Part(name, DTYPES[kind], tuple(sizes), None if start is None else tuple(start))
    return None


class Link:
    """
    Args:
        peers: global ranks.
        group: a process group which has them and this rank; None: the default one.
        seconds: the longest that one message may take, waiting for the other side included.
        device: of what is sent; without, the current CUDA device for NCCL, the host for all others.
    """

    def __init__(self, peers: Sequence[int], group: dist.ProcessGroup | None, seconds: float, device: Any = None) -> None:
        self.peers, self._group, self._deadline = tuple(peers), group, timedelta(seconds=seconds)
        nccl = device is None and dist.get_backend(group) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device(device or "cpu")

    def send(self, memory: Tensor, peers: Sequence[int] | None = None) -> None:
        """
        Raises:
            StreamError: a peer is gone, or did not take it in time. The group is of no use to the two any more.
        """
        memory = memory.to(self.device)
        peers = self.peers if peers is None else peers
        works: list[tuple[int, Any]] = []
        for peer in peers:
            with self._reaching(peer, "send to"):
                works.append((peer, dist.isend(memory, peer, self._group)))
        for peer, work in works:
            with self._reaching(peer, "send to"):
                work.wait(self._deadline)

    def receive(self, memory: Tensor, peer: int) -> None:
        """Fill ``memory``. Raises StreamError as :meth:`send`."""
        with self._reaching(peer, "receive from"):
            work: Any = dist.irecv(memory, peer, self._group)
            work.wait(self._deadline)

    def say(self, frame: str, peers: Sequence[int] | None = None, why: str = "", **fields: Any) -> None:
        """``why``: as much of it as fits whatever is in it. A character may be twelve bytes of JSON, and half of one is none."""
        self.send(encode({"frame": frame, "why": why.encode(errors="replace").decode()[:800], **fields}), peers)

    def hear(self, peer: int) -> dict[str, Any]:
        """Raises StreamError: also for a damaged message."""
        memory = torch.empty(MESSAGE_BYTES, dtype=torch.uint8, device=self.device)
        self.receive(memory, peer)
        return decode(memory.cpu(), f"rank {peer}")

    @contextmanager
    def _reaching(self, peer: int, doing: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            text = str(error).strip() or type(error).__name__
            raise StreamError(
                f"cannot {doing} rank {peer}",
                expected=f"an answer within {self._deadline.total_seconds():g} s",
                found=text.splitlines()[0].rpartition("] ")[2][:200],
                remedy="What was open is aborted. Send again over a new process group, or after both sides were restarted.",
            ) from error
