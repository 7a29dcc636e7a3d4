"""A trainer's weights as a stream of buckets over ``torch.distributed``: the receiving side, a source of a reload.

One bucket is in memory. It is digested before any of it is given out, and answered after all of it was taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor

from ..layout.boxes import Box
from .digest import digest_of
from .errors import StreamError
from .stream_link import AGAIN, Link, parts_of


class Streamed(NamedTuple):
    """A tensor, or a box of it. ``value`` lies in the stream's one bucket: use it before asking for the next."""

    name: str
    value: Tensor
    box: Box | None


class WeightStream:
    """What :func:`send_weights` of rank ``src`` sends, as an iterator that :meth:`ReloadSession.load` takes::

        with WeightStream(src=0) as stream, reload(model, policy="journal", source="stream") as r:
            r.load(stream)

    The reload inside, the stream around it: the trainer learns whether the reload was committed. What breaks raises, inside the
    reload, which is thereby aborted.

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

    def __iter__(self) -> Iterator[Streamed]:
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

    def _bucket(self, frame: dict[str, Any], number: int) -> Iterator[Streamed]:
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
            yield Streamed(part.name, part.of(payload), part.box)

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
