"""A trainer's weights as a stream of buckets over ``torch.distributed``: the sending side."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..layout.blocks import tiles
from ..layout.boxes import sizes, whole
from .digest import digest_of
from .errors import StreamError
from .stream_link import AGAIN, ALIGNMENT, Link, Part, room_for


def send_weights(
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    dst: int | Sequence[int],
    *,
    group: dist.ProcessGroup | None = None,
    bucket_bytes: int = 64 << 20,
    seconds: float = 60.0,
    checksum: str = "adler32",
    device: Any = None,
) -> int:
    """Send tensors by their checkpoint names; returns the bytes of them when every receiver has left its block without an error.

    With the receiver's reload inside that block, as :class:`WeightStream` shows, it has committed then. Several receivers commit
    each by itself; for all or none prepare in the block and commit by :class:`~aliasparam.reload.ranks_store.Ranks`.

    Args:
        tensors: of any device and strides; of an iterable one at a time. A tensor that is larger than a bucket is sent in parts.
        dst: global ranks.
        group: with this rank and those; gloo or NCCL.
        bucket_bytes: memory, here and there.
        seconds: the longest wait for the other side, its commit included.
        checksum: of every bucket: "adler32" (summed on the device), "xxh3-128" or "blake3".
        device: of buckets; without, the CUDA device for NCCL, the host for all others.

    Raises:
        StreamError: a receiver refused (it says why), is gone or late; a dtype without a name. The others are told.
    """
    link = Link((dst,) if isinstance(dst, int) else dst, group, seconds, device)
    sender = _Sender(link, bucket_bytes, checksum)
    try:
        for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
            sender.add(name, tensor.detach())
        return sender.end()
    except BaseException as error:
        sender.give_up(error)
        raise


class _Sender:
    """One bucket, filled and sent; the next is filled while the receivers take it."""

    def __init__(self, link: Link, bucket_bytes: int, checksum: str) -> None:
        if bucket_bytes < ALIGNMENT:
            raise StreamError("the bucket is too small", expected=f"at least {ALIGNMENT} bytes", found=bucket_bytes)
        self._link, self._checksum = link, checksum
        self._memory = torch.zeros(bucket_bytes, dtype=torch.uint8, device=link.device)
        self._parts: list[list[Any]] = []
        self._used = self._text = self._buckets = self._total = 0
        self._to_answer: set[int] = set()  # have a frame
        self._listening = set(link.peers)  # will take another frame, after an answer if they owe one

    def add(self, name: str, tensor: Tensor) -> None:
        limit = self._memory.numel() // tensor.dtype.itemsize
        if tensor.numel() <= limit:
            self._put(Part(name, tensor.dtype, tuple(tensor.shape)), tensor)
            return
        for box in tiles(whole(tensor.shape), limit):
            part = Part(name, tensor.dtype, sizes(box), tuple(start for start, _ in box))
            self._put(part, tensor[tuple(slice(a, b) for a, b in box)])

    def end(self) -> int:
        self._flush()
        self._exchange("end", None, buckets=self._buckets)
        self._listening = set()
        self._hear_answers()
        return self._total

    def give_up(self, error: BaseException) -> None:
        """Tell those who still listen. What fails now is not the error to raise."""
        for peer in sorted(self._listening):
            try:
                if peer not in self._to_answer or self._link.hear(peer).get("frame") == "taken":
                    self._link.say("gave up", [peer], f"{type(error).__name__}: {error}")
            except StreamError:
                continue

    def _put(self, part: Part, values: Tensor) -> None:
        fields = part.fields()
        text = len(json.dumps(fields)) + 1
        if not room_for(text):
            raise StreamError("a name is too long to be sent", name=part.name[:120], found=f"{len(part.name)} characters")
        if part.behind(self._used).end > self._memory.numel() or not room_for(self._text + text):
            self._flush()
        part = part.behind(self._used)
        part.of(self._memory).copy_(values)
        self._parts.append(fields)
        self._used, self._text, self._total = part.end, self._text + text, self._total + part.nbytes

    def _flush(self) -> None:
        if not self._parts:
            return
        payload = self._memory[: self._used]
        facts = {"bytes": self._used, "checksum": self._checksum, "digest": digest_of(payload, self._checksum)}
        self._exchange("bucket", payload, number=self._buckets, **facts, tensors=self._parts)
        self._parts, self._used, self._text, self._buckets = [], 0, 0, self._buckets + 1

    def _exchange(self, frame: str, payload: Tensor | None, **fields: Any) -> None:
        """Hear what became of the frame before, then send this one."""
        self._hear_answers()
        listening, self._listening = self._listening, set()  # until it went through nobody knows what they have
        self._link.say(frame, **fields)
        if payload is not None and payload.numel():
            self._link.send(payload)
        self._listening, self._to_answer = listening, set(self._link.peers)

    def _hear_answers(self) -> None:
        refused = {}
        for peer in sorted(self._to_answer):
            listens = self._listening & {peer}
            self._to_answer.discard(peer)
            self._listening -= listens
            answer = self._link.hear(peer)
            if answer.get("frame") != "taken":
                refused[peer] = str(answer.get("why"))
            else:
                self._listening |= listens
        if refused:
            first = next(iter(refused))
            raise StreamError(f"rank {first} refused the weights", expected="taken by all", found=refused[first], remedy=AGAIN)
