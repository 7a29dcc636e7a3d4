"""Bytes from one rank to another over ``torch.distributed``, each within a deadline."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import StreamError
from .stream_frames import decode, encode

#: Bytes of an answer.
_ANSWER_BYTES = 4 << 10
AGAIN = "Send all weights again, after the cause is mended."


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
        works = [(peer, lambda peer=peer: dist.isend(memory, peer, self._group)) for peer in peers]
        begun = [(peer, self._try(begin, peer, "send to")) for peer, begin in works]
        for peer, work in begun:
            self._wait(work, peer, "send to")

    def receive(self, memory: Tensor, peer: int) -> None:
        """Fill ``memory``. Raises StreamError as :meth:`send`."""
        self._wait(self._try(lambda: dist.irecv(memory, peer, self._group), peer, "receive from"), peer, "receive from")

    def say(self, frame: str, peers: Sequence[int] | None = None, **fields: Any) -> None:
        self.send(encode({"frame": frame, **fields}), peers)

    def hear(self, peer: int) -> dict[str, Any]:
        """Raises StreamError: also for a damaged message."""
        return self._hear(peer, encode({}))

    def answer(self, peer: int, frame: str, why: str = "") -> None:
        self.send(encode({"frame": frame, "why": why[:800]}, _ANSWER_BYTES), [peer])

    def hear_answer(self, peer: int) -> dict[str, Any]:
        return self._hear(peer, encode({}, _ANSWER_BYTES))

    def _hear(self, peer: int, like: Tensor) -> dict[str, Any]:
        memory = torch.empty_like(like, device=self.device)
        self.receive(memory, peer)
        return decode(memory.cpu(), f"rank {peer}")

    def _wait(self, work: Any, peer: int, doing: str) -> None:
        self._try(lambda: work.wait(self._deadline), peer, doing)

    def _try(self, do: Any, peer: int, doing: str) -> Any:
        try:
            return do()
        except (RuntimeError, ValueError) as error:
            text = str(error).strip() or type(error).__name__
            raise StreamError(
                f"cannot {doing} rank {peer}",
                expected=f"an answer within {self._deadline.total_seconds():g} s",
                found=text.splitlines()[0].rpartition("] ")[2][:200],
                remedy="What was open is aborted. Send again over a new process group, or after both sides were restarted.",
            ) from error
