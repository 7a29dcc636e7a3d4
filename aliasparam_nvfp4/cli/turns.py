"""When a job may have the model: while no forward runs.

transformers serves a model from one thread, request after request. A job in that thread's queue runs between two requests; a job
taken up by the model's own forward hook runs between two tokens of whatever is being generated.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from torch import nn

Job = Callable[[], Any]


class InferenceThread(Protocol):
    """transformers' ``GenerateManager``: all its jobs run on one thread, in order."""

    def submit(self, fn: Job) -> Any:
        """Put ``fn`` into the thread's queue."""


class Turns:
    """Jobs on a model that is being served by ``thread``."""

    def __init__(self, model: nn.Module, thread: InferenceThread) -> None:
        self._thread = thread
        self._waiting: deque[tuple[Job, Future[Any]]] = deque()
        model.register_forward_pre_hook(lambda *_: self._run_waiting())

    async def when_idle(self, job: Job) -> Any:
        """Run ``job`` after the requests that came before it; what comes later waits for it."""
        done: Future[Any] = Future()
        self._thread.submit(lambda: _run(job, done))
        return await asyncio.wrap_future(done)

    async def between_tokens(self, job: Job) -> Any:
        """Run ``job`` before the next token of a running request, or at once where none runs."""
        done: Future[Any] = Future()
        self._waiting.append((job, done))
        self._thread.submit(self._run_waiting)
        return await asyncio.wrap_future(done)

    def _run_waiting(self) -> None:
        while self._waiting:
            _run(*self._waiting.popleft())


def _run(job: Job, done: Future[Any]) -> None:
    """What the job raises belongs to who asked for it, never to the request that is being generated."""
    if not done.set_running_or_notify_cancel():
        return
    try:
        done.set_result(job())
    except BaseException as error:
        done.set_exception(error)
