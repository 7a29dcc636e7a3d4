"""SGLang's engine in processes of its own, one at a time: the end of one ends all that a process has started."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .runner import CPU, PROMPT

GREEDY = {"temperature": 0, "max_new_tokens": 8}
LONG = [token % 50 + 1 for token in range(200)]
SAID = "the model refuses until weights are loaded"


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    import sglang

    started = sglang.Engine(model_path=str(folder), **(CPU | options))
    try:
        yield started
    finally:
        started.shutdown()


def tokens(engine: Any) -> list[int]:
    return engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"]  # type: ignore[no-any-return]


def update(engine: Any, folder: Path) -> bool:
    """Whether the folder's weights are served. SGLang says that they are not, though they are, while a request that has ended
    stands on its lists for one more step: then the update is sent again."""
    for _ in range(50):
        success, message, *_ = engine.update_weights_from_disk(str(folder))
        if success or "cache was not flushed" not in message:
            break
        time.sleep(0.1)
    return bool(success)


def fails(engine: Any) -> None:
    """Layers refuse from the middle of an answer on: its request ends there, and those that follow are not answered."""
    greedy = {"temperature": 0, "max_new_tokens": 500, "ignore_eos": True}
    last: dict[str, Any] = {}
    for last in engine.generate(input_ids=PROMPT, sampling_params=greedy, return_logprob=True, stream=True):
        if len(last["output_ids"]) == 5:
            engine.collective_rpc("invalidate_all")
    reason = last["meta_info"]["finish_reason"]
    assert reason["type"] == "abort" and SAID in reason["message"] and 5 <= len(last["output_ids"]) < 500
    for prompts in ([PROMPT[:4], LONG, PROMPT], PROMPT, LONG):  # of several the first to fail is answered
        for more in ({}, {"return_logprob": True, "logprob_start_len": 0}):
            with pytest.raises(Exception, match=SAID):
                engine.generate(input_ids=prompts, sampling_params=GREEDY, **more)
