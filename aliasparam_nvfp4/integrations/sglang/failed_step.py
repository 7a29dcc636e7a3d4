"""A forward that refuses fails its requests, not the scheduler.

After ``reset_tensors`` of ``/weights_checker``, or an update that could not be taken back, the model refuses until weights are
loaded. SGLang's scheduler ends at any error of a forward, but can drop what a forward gave and finish its request with a reason
(``Req.discard_output_reason``, for keys and values that never came): so do requests of a forward that refused. Nothing of them
reaches the cache of prefixes. Tried on 0.5.23.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.runtime_context import get_parallel

from ..refusal import is_refusal, need_runnable

_logger = logging.getLogger(__name__)


class _Refused(GenerationBatchResult):  # type: ignore[misc]
    """Of a batch that did not run: a token 0 for each request, which nobody gets to see."""


def forward(original: Any, worker: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ``TpModelWorker.forward_batch_generation`` (``sglang/srt/managers/tp_worker.py``).

    Graphs that were captured replay without a module, so a model that refuses is asked before. Pipeline stages and draft models
    want more of a result than this, so there the refusal goes on.
    """
    try:
        need_runnable(worker.model_runner.model)
        return original(worker, batch, *args, **kwargs)
    except Exception as error:
        if not is_refusal(error) or not _is_plain(worker, batch):
            raise
        _refuse(batch.reqs, error)
        tokens = torch.zeros(len(batch.reqs), dtype=torch.int64, device=batch.device)
        return _Refused(logits_output=LogitsProcessorOutput(next_token_logits=None), next_token_ids=tokens)


def embed(original: Any, worker: Any, batch: Any) -> Any:
    """AROUND ``BaseTpWorker.forward_batch_embedding``, beside it: the same."""
    try:
        need_runnable(worker.model_runner.model)
        return original(worker, batch)
    except Exception as error:
        if not is_refusal(error) or get_parallel().pp_size != 1:
            raise
        _refuse(batch.reqs, error)
        nothing = torch.zeros(len(batch.reqs), 1, device=batch.device)
        return SimpleNamespace(embeddings=nothing, pooled_hidden_states=None), False


def _is_plain(worker: Any, batch: Any) -> bool:
    simple = batch is not None and batch.spec_algorithm.is_none() and not worker.is_dllm() and get_parallel().pp_size == 1
    return simple and all(request.beam_group is None for request in batch.reqs)


def _refuse(requests: Sequence[Any], error: BaseException) -> None:
    said = f"aliasparam_nvfp4: the model refuses until weights are loaded. {error}"
    new = [request for request in requests if request.discard_output_reason is None]
    if new:  # and no further piece of a long prompt
        _logger.error("%d requests fail: %s", len(new), said)
    for request in new:
        request.skip_radix_cache_insert, request.return_logprob = True, False
        request.discard_output_reason = FINISH_ABORT(said, HTTPStatus.SERVICE_UNAVAILABLE)


def decode(original: Any, processor: Any, batch: Any, result: Any) -> None:
    """AROUND ``SchedulerBatchResultProcessor.process_batch_result_decode``
    (``sglang/srt/managers/scheduler_components/batch_result_processor.py``), which knows a reason to drop a token, but not this
    one."""
    if not isinstance(result, _Refused):
        original(processor, batch, result)
        return
    for request in batch.reqs:
        if not (request.finished() or request.is_retracted):
            request.to_finish = request.discard_output_reason
            request.update_finish_state(0)
            processor._handle_sampling_mask_abort(request)
    processor.output_streamer.stream_output(batch.reqs, batch.return_logprob)
