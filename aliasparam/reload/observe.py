"""What a reload tells of itself: hooks, one log line, metrics where ``prometheus_client`` is installed, NVTX ranges on CUDA."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

_log = logging.getLogger("aliasparam.reload")
_generations: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()

#: Upper bounds of the pause's histogram, seconds.
_PAUSES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

_registering = threading.RLock()  # an interrupt at its end may leave it held, by this thread

Hook = Callable[[Any], None]


@dataclass
class Hooks:
    """Called with the session.

    Attributes:
        on_begin: before the first write; what raises aborts the reload.
        on_commit: with the new weights in place, before the model runs with them: for caches that depend on weights. What raises
            comes out of ``commit``; the session stays prepared, and the next ``commit`` goes on with the hooks that are left.
        on_abort: at the end of a reload that was not committed. What raises is called once more, then logged as an error and
            kept in ``session.failed_hooks``.
    """

    on_begin: list[Hook] = field(default_factory=list)
    on_commit: list[Hook] = field(default_factory=list)
    on_abort: list[Hook] = field(default_factory=list)


@dataclass
class Observed:
    """Figures of one reload.

    Attributes:
        source: where the values come from, for metrics ("tensors", "folder", "delta").
        policy: the session's.
        bytes: of values that were handed to it.
        pause_seconds: of the last commit, hooks included.
        generation: commits of this model so far, after the end.
        outcome: "committed", "restored" (the old weights serve) or "refuses".
    """

    source: str
    policy: str
    bytes: int = 0
    tensors: int = 0
    pause_seconds: float = 0.0
    generation: int = 0
    outcome: str = ""
    started: float = field(default_factory=time.perf_counter)

    def took(self, nbytes: int) -> None:
        """Count the values of one tensor, or of a part of it."""
        self.bytes += nbytes
        self.tensors += 1

    def ended(self, model: nn.Module, outcome: str) -> None:
        """Count, and write the log line."""
        self.outcome = outcome
        self.generation = _generations[model] = _generations.get(model, 0) + (outcome == "committed")
        seconds = time.perf_counter() - self.started
        facts = {"model": type(model).__name__, "outcome": outcome, **asdict(self), "seconds": round(seconds, 6)}
        facts["pause_seconds"] = round(self.pause_seconds, 6)
        del facts["started"]
        level = logging.INFO if outcome != "refuses" else logging.ERROR
        _log.log(level, "reload %s", " ".join(f"{key}={value}" for key, value in facts.items()), extra={"reload": facts})
        _count(self, seconds)


def call_abort_hooks(hooks: Hooks, session: Any) -> list[tuple[Hook, Exception]]:
    """Every one, twice if it raises; returns those that failed, which are in the log too."""
    failed = []
    for hook in hooks.on_abort:
        for attempt in range(2):
            try:
                hook(session)
                break
            except Exception as error:
                if attempt:
                    failed.append((hook, error))
                    _log.exception("an on_abort hook failed twice: %r", hook)
    return failed


def phase(name: str) -> AbstractContextManager[None]:
    """An NVTX range where CUDA is in use."""
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.nvtx.range(f"aliasparam.reload.{name}") if used else nullcontext()


@cache
def _metrics() -> Any:
    """(histograms of seconds and of the pause, counters of bytes and of outcomes, gauge of the generation), or None."""
    if find_spec("prometheus_client") is None:
        return None
    prometheus = import_module("prometheus_client")
    try:
        return (
            prometheus.Histogram("weight_load_duration_seconds", "Seconds from begin to end of a reload", ["source"]),
            prometheus.Histogram("weight_load_pause_seconds", "Seconds of the commit of a reload", ["source"], buckets=_PAUSES),
            prometheus.Counter("weight_load_bytes", "Bytes of values handed to reloads", ["source"]),
            prometheus.Counter("weight_loads", "Reloads that ended", ["source", "outcome"]),
            prometheus.Gauge("weight_generation", "Commits of the model that was reloaded last"),
        )
    except ValueError as error:  # other code has a metric of one of these names
        _log.error("no metrics of reloads: %s", error)
        return None


def _count(observed: Observed, seconds: float) -> None:
    with _registering:  # two reloads may end at once
        found = _metrics()
    if found is not None:
        duration, pause, count, outcomes, generation = found
        duration.labels(observed.source).observe(seconds)
        if observed.outcome == "committed":
            pause.labels(observed.source).observe(observed.pause_seconds)
        count.labels(observed.source).inc(observed.bytes)
        outcomes.labels(observed.source, observed.outcome).inc()
        generation.set(observed.generation)
