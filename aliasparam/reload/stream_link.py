"""Bytes from one rank to another over ``torch.distributed``, each within a deadline.

Frames of a weight stream: one message of JSON before each bucket of bytes, and one at the end. Nothing is unpickled.

A message is SHA-256 (hex) of its text and the text, padded with spaces: of one size, so that a receiver never asks for more.

| frame | fields |
|---|---|
| ``bucket`` | ``number``; ``bytes`` that follow, their ``checksum`` and ``digest``; ``tensors``: fields of each :class:`Part` |
| ``end`` | ``buckets``: how many there were |
| ``gave up`` | ``why`` |
| ``taken``, ``refused`` | the receiver's answers; ``why`` |
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

from ..layout.boxes import Box, sizes
from .errors import SourceError, StreamError
from .header import DTYPES, can_be, is_sizes, parse_json
from .held_file import memory_of

#: Bytes of a message: the parts of a bucket are as many as fit.
MESSAGE_BYTES = 64 << 10
_SEAL = 64
#: Bytes of an answer.
_ANSWER_BYTES = 4 << 10
AGAIN = "Send all weights again, after the cause is mended."
#: Where a part begins in its bucket: a multiple of the widest element.
ALIGNMENT = 16

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Part(NamedTuple):
    """A tensor, or a box of it, in a bucket; ``offset`` in bytes, ``shape`` of the whole tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    box: Box | None
    offset: int

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.shape if self.box is None else sizes(self.box)

    @property
    def nbytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize

    def of(self, memory: Tensor) -> Tensor:
        """Its values in the bucket's memory, uint8 [n]."""
        return memory[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.sizes)

    def fields(self) -> list[Any]:
        """
        Raises:
            StreamError: a dtype that files have no name for.
        """
        if self.dtype not in _NAMES:
            raise StreamError("tensors of this dtype are not sent", name=self.name, expected=", ".join(DTYPES), found=self.dtype)
        return [self.name, _NAMES[self.dtype], self.shape, self.box, self.offset]


def encode(fields: dict[str, Any], size: int = MESSAGE_BYTES) -> Tensor:
    """uint8 [size]. The caller has seen to it that it fits."""
    text = json.dumps(fields, separators=(",", ":")).encode()
    message = hashlib.sha256(text).hexdigest().encode() + text
    return torch.frombuffer(bytearray(message.ljust(size)), dtype=torch.uint8)


def _words(why: str) -> str:
    """As much of it as fits an answer whatever is in it: a character may be twelve bytes of JSON, and half of one is none."""
    why = why.encode(errors="replace").decode()[:800]
    while len(json.dumps(why)) > _ANSWER_BYTES - _SEAL - 64:
        why = why[: len(why) * 7 // 8]
    return why


def room_for(text: int) -> bool:
    """Whether parts whose fields are so many characters of JSON fit one message."""
    return text < MESSAGE_BYTES - _SEAL - 512


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
        if part is None or part.offset % ALIGNMENT or not end <= part.offset <= part.offset + part.nbytes <= fields["bytes"]:
            expected = "name, dtype, shape, box and offset within the bucket"
            raise StreamError("a bucket's entry is not one", name=where, expected=expected, found=repr(entry)[:80])
        end = part.offset + part.nbytes
        parts.append(part)
    return parts


def _part(entry: Any) -> Part | None:
    if not isinstance(entry, list) or len(entry) != 5:
        return None
    name, kind, shape, box, offset = entry
    if not isinstance(name, str) or not isinstance(kind, str) or kind not in DTYPES or not is_sizes([offset]):
        return None
    if not is_sizes(shape) or (box is not None and not _is_box(box, shape)):
        return None
    part = Part(name, DTYPES[kind], tuple(shape), None if box is None else tuple((a, b) for a, b in box), offset)
    return part if can_be(part.sizes) else None


def _is_box(box: Any, shape: list[int]) -> bool:
    if not isinstance(box, list) or len(box) != len(shape):
        return False
    return all(is_sizes(pair) and len(pair) == 2 and pair[0] <= pair[1] <= n for pair, n in zip(box, shape, strict=True))


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

    def say(self, frame: str, peers: Sequence[int] | None = None, **fields: Any) -> None:
        self.send(encode({"frame": frame, **fields}), peers)

    def give_up(self, peer: int, why: str) -> None:
        self.say("gave up", [peer], why=_words(why))

    def hear(self, peer: int) -> dict[str, Any]:
        """Raises StreamError: also for a damaged message."""
        return self._hear(peer, MESSAGE_BYTES)

    def answer(self, peer: int, frame: str, why: str = "") -> None:
        self.send(encode({"frame": frame, "why": _words(why)}, _ANSWER_BYTES), [peer])

    def hear_answer(self, peer: int) -> dict[str, Any]:
        return self._hear(peer, _ANSWER_BYTES)

    def _hear(self, peer: int, size: int) -> dict[str, Any]:
        memory = torch.empty(size, dtype=torch.uint8, device=self.device)
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
