"""A trainer's weights as a stream of buckets over ``torch.distributed``: both sides of it.

One bucket is in memory on each side. The receiver, a source of a reload, digests it before any of it is given out, and answers
after all of it was taken; meanwhile the trainer fills the next.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from ..layout.boxes import Box, sizes, tiles, whole
from .digest import digest_of
from .errors import StreamError
from .stream_link import AGAIN, ALIGNMENT, TEXT_BYTES, Link, Part, parts_of


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
        bucket_bytes: memory for one bucket, on either side.
        seconds: the longest wait for the other side, its commit included.
        checksum: of every bucket: "adler32" (summed on the device), "xxh3-128" or "blake3".
        device: of buckets; without, the CUDA device for NCCL, the host for all others.

    Raises:
        StreamError: a receiver refused (it says why), is gone or late; a dtype without a name. The others are told.
    """
    if bucket_bytes < ALIGNMENT:
        raise StreamError("the bucket is too small", expected=f"at least {ALIGNMENT} bytes", found=bucket_bytes)
    link, total, number = Link((dst,) if isinstance(dst, int) else dst, group, seconds, device), 0, 0
    memory = torch.zeros(bucket_bytes, dtype=torch.uint8, device=link.device)
    receivers = _Receivers(link)
    try:
        for parts in _filled(memory, tensors.items() if isinstance(tensors, Mapping) else tensors):
            payload, fields = memory[: parts[-1].end], [part.fields() for part in parts]
            facts = {"bytes": payload.numel(), "checksum": checksum, "digest": digest_of(payload, checksum)}
            receivers.exchange("bucket", payload, number=number, **facts, tensors=fields)
            number, total = number + 1, total + sum(part.nbytes for part in parts)
        receivers.exchange("end", buckets=number)
        receivers.end()
    except BaseException as error:
        receivers.give_up(error)
        raise
    return total


def _filled(memory: Tensor, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[list[Part]]:
    """What lies in the bucket each time that it is full, or holds the rest."""
    parts: list[Part] = []
    end = text = 0
    for part, values in _parts(tensors, memory.numel()):
        size = len(json.dumps(part.fields())) + 1
        if size > TEXT_BYTES:
            raise StreamError("a name is too long to be sent", name=part.name[:120], found=f"{len(part.name)} characters")
        if part.behind(end).end > memory.numel() or text + size > TEXT_BYTES:
            yield parts
            parts, end, text = [], 0, 0
        parts.append(part.behind(end))
        parts[-1].of(memory).copy_(values)
        end, text = parts[-1].end, text + size
    if parts:
        yield parts


def _parts(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[tuple[Part, Tensor]]:
    """Tensors, or boxes of them, of at most ``limit`` bytes."""
    for name, tensor in tensors:
        tensor, most = tensor.detach(), limit // tensor.dtype.itemsize
        if tensor.numel() <= most:
            yield Part(name, tensor.dtype, tuple(tensor.shape)), tensor
            continue
        for box in tiles(whole(tensor.shape), most):
            part = Part(name, tensor.dtype, sizes(box), tuple(start for start, _ in box))
            yield part, tensor[tuple(slice(a, b) for a, b in box)]


class _Receivers:
    """Who will take another frame, and whether they owe an answer to the one before."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._owe = dict.fromkeys(sorted(link.peers), False)
        self._sent = 0  # frames; an answer has the number of its own, from 0

    def exchange(self, frame: str, payload: Tensor | None = None, **fields: Any) -> None:
        """Hear what became of the frame before, then send this one: the bucket was filled while they took the one before."""
        self._hear_answers(self._owe)
        peers, self._owe = self._owe, {}  # until it went through nobody knows what they have
        self._link.say(frame, **fields)
        if payload is not None and payload.numel():
            self._link.send(payload)
        self._owe, self._sent = dict.fromkeys(peers, True), self._sent + 1

    def end(self) -> None:
        peers, self._owe = self._owe, {}
        self._hear_answers(peers)

    def give_up(self, error: BaseException) -> None:
        """Tell those who still listen. What fails now is not the error to raise."""
        for peer, owes in self._owe.items():
            try:
                if not owes or self._link.hear(peer).get("frame") == "taken":
                    self._link.say("gave up", [peer], f"{type(error).__name__}: {error}")
            except StreamError:
                continue

    def _hear_answers(self, peers: dict[int, bool]) -> None:
        """Who took it owes none any more; who did not, or cannot be heard, is no more among ``peers``."""
        refused = {}
        for peer in [peer for peer, owes in peers.items() if owes]:
            del peers[peer]
            answer = self._link.hear(peer)
            if answer.get("frame") != "taken":
                refused[peer] = str(answer.get("why"))
            elif answer.get("number") != self._sent - 1:
                refused[peer] = f"an answer to frame {answer.get('number')} in the place of one to {self._sent - 1}"
            else:
                peers[peer] = False
        if refused:
            first = next(iter(refused))
            raise StreamError(f"rank {first} refused the weights", expected="taken by all", found=refused[first], remedy=AGAIN)


# -- the receiver --------------------------------------------------------------------------------------------------------


class WeightStream:
    """What :func:`send_weights` of rank ``src`` sends, as an iterator that :meth:`ReloadSession.load` takes::

        with WeightStream(src=0) as stream, reload(model, policy="journal", source="stream") as r:
            r.load(stream)

    With the stream around the reload the trainer learns whether it was committed. Whatever breaks the stream raises inside the
    reload, and so aborts it.

    Args:
        src, group, seconds, device: as for :func:`send_weights`. ``seconds`` is the longest wait for the next bucket.
        max_bucket_bytes: memory; larger buckets are refused.

    Raises (while it is iterated):
        StreamError: the trainer gave up, is gone or late; a message or a bucket is damaged, or out of order.
    """

    def __init__(
        self,
        src: int,
        *,
        group: dist.ProcessGroup | None = None,
        max_bucket_bytes: int = 1 << 30,
        seconds: float = 60.0,
        device: Any = None,
    ) -> None:
        self._src, self._max = src, max_bucket_bytes
        self._link = Link((src,), group, seconds, device)
        self._memory = torch.empty(0, dtype=torch.uint8, device=self._link.device)
        self._owed: int | None = None  # the frame that waits for an answer, counted from 0
        self._ended = False

    def __iter__(self) -> Iterator[tuple[str, Tensor, Box | None]]:
        """(name, values, box of the tensor that they are; None: all of it). Values lie in the stream's one bucket: use them
        before asking for the next."""
        for number in range(1 << 62):
            frame = self._link.hear(self._src)
            if frame.get("frame") == "bucket":
                yield from self._bucket(frame, number)
                self._answer("taken")
                continue
            self._end(frame, number)
            return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._owed is not None and error is None and self._ended:
            self._answer("taken")
        elif self._owed is not None:
            try:
                self._answer("refused", f"{type(error).__name__}: {error}" if error is not None else "it stopped before the end")
            except StreamError:
                if error is None:
                    raise

    def _answer(self, frame: str, why: str = "") -> None:
        number, self._owed = self._owed, None
        self._link.say(frame, [self._src], why, number=number)

    def _bucket(self, frame: dict[str, Any], number: int) -> Iterator[tuple[str, Tensor, Box | None]]:
        where = f"rank {self._src}, bucket {number}"
        nbytes, checksum = frame.get("bytes"), frame.get("checksum")
        if type(nbytes) is not int or not 0 <= nbytes <= self._max:
            expected = f"at most {self._max} bytes"
            raise StreamError("the bucket is larger than what may be received", name=where, expected=expected, found=nbytes)
        if self._memory.numel() < nbytes:
            self._memory = self._memory.new_empty(0)  # freed before the larger one is made
            self._memory = torch.empty(nbytes, dtype=torch.uint8, device=self._link.device)
        payload = self._memory[:nbytes]
        if nbytes:
            self._link.receive(payload, self._src)
        self._owed = number
        if frame.get("number") != number:
            raise StreamError("a bucket is missing or came twice", name=where, expected=number, found=frame.get("number"))
        parts = parts_of(frame, where)
        digest = digest_of(payload, str(checksum))
        if digest != frame.get("digest"):
            raise StreamError("a bucket is damaged", name=where, expected=frame.get("digest"), found=digest, remedy=AGAIN)
        for part in parts:
            yield part.name, part.of(payload), part.box

    def _end(self, frame: dict[str, Any], number: int) -> None:
        if frame.get("frame") == "gave up":
            raise StreamError("the trainer gave up", name=f"rank {self._src}", found=str(frame.get("why"))[:800])
        self._owed = number
        if frame.get("frame") != "end" or frame.get("buckets") != number:
            raise StreamError(
                "the stream ends with something else",
                name=f"rank {self._src}",
                expected=f"an end after {number} buckets",
                found=f"{frame.get('frame')!r} after {frame.get('buckets')}"[:80],
            )
        self._ended = True
