"""Every rank's answer to a call is read, also after one that failed.

vLLM stops reading at the first rank that failed, and takes what the others had answered for their answers to the next call.
``MultiprocExecutor.collective_rpc`` (vllm/v1/executor/multiproc_executor.py, 0.32.0) goes through ``self.response_mqs``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from vllm.v1.executor.multiproc_executor import WorkerProc

from ..agreement import PATIENCE


class _Queue:
    """One rank's queue in one pass over all."""

    def __init__(self, queue: Any, later: Sequence[Any]) -> None:
        self._queue, self._later = queue, later

    def dequeue(self, *args: Any, **kwargs: Any) -> Any:
        answer = self._queue.dequeue(*args, **kwargs)
        if answer[0] != WorkerProc.ResponseStatus.SUCCESS:
            for queue in self._later:
                with suppress(TimeoutError):
                    queue.dequeue(timeout=PATIENCE.total_seconds())
        return answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)


class Answers(list[Any]):
    """The queues of all ranks."""

    def __iter__(self) -> Iterator[Any]:
        queues = [self[rank] for rank in range(len(self))]
        return iter([_Queue(queue, queues[rank + 1 :]) for rank, queue in enumerate(queues)])


def collective_rpc(original: Any, executor: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ``MultiprocExecutor.collective_rpc``."""
    if not isinstance(executor.response_mqs, Answers):
        executor.response_mqs = Answers(executor.response_mqs)
    return original(executor, *args, **kwargs)
