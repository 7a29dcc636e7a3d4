"""A forward that refuses fails its requests, not the engine.

After a reload that failed without its old weights the model refuses until a whole reload. Left alone, vLLM's engine process
dies of it, and in-process the request stays scheduled and fails at every later step.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.output import CachedRequestData
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import RequestStatus

from aliasparam.errors import StateError

from ..refusal import SENT, is_refusal, need_runnable

logger = init_logger("vllm.aliasparam_nvfp4")


def execute_model(original: Any, worker: Any, scheduled: Any) -> Any:
    """AROUND ``Worker.execute_model`` (vllm/v1/worker/gpu_worker.py, 0.32.0): vLLM compiles without guards, and its graphs replay
    without a module, so a model that refuses is asked before. What the scheduler tells of requests that ended is taken in."""
    try:
        if scheduled.total_num_scheduled_tokens:
            need_runnable(worker.model_runner.get_model())
    except StateError:
        nothing = {"scheduled_new_reqs": [], "scheduled_cached_reqs": CachedRequestData.make_empty(), "num_scheduled_tokens": {}}
        nothing |= {"total_num_scheduled_tokens": 0, "scheduled_spec_decode_tokens": {}, "scheduled_encoder_inputs": {}}
        original(worker, replace(scheduled, **nothing))
        raise
    return original(worker, scheduled)


def enqueue_output(original: Any, worker: Any, output: Any) -> None:
    """AROUND ``WorkerProc.enqueue_output`` (vllm/v1/executor/multiproc_executor.py, 0.32.0), which sends an error as its text."""
    refused = isinstance(output, Exception) and is_refusal(output)
    original(worker, RuntimeError(f"{SENT}{output}") if refused else output)


def step(original: Any, core: Any) -> Any:
    """AROUND ``EngineCore.step`` and ``step_with_batch_queue`` (vllm/v1/engine/core.py, 0.32.0)."""
    try:
        return original(core)
    except Exception as error:
        if not is_refusal(error):
            raise
        return failed(core, error), False


def failed(core: Any, error: BaseException) -> dict[int, EngineCoreOutputs]:
    """Finish every request with an error. Blocks of keys and values that were promised and not computed are forgotten."""
    while core.batch_queue:
        future = core.batch_queue.pop()[0]
        try:
            future.result()
        except Exception as later:
            logger.debug("a step behind the one that refused: %s", later)
    requests = core.scheduler.finish_requests(None, RequestStatus.FINISHED_ERROR)
    core.reset_prefix_cache()
    logger.error("aliasparam_nvfp4: the model refuses until it is reloaded whole; %d requests failed. %s", len(requests), error)
    outputs: defaultdict[int, list[Any]] = defaultdict(list)
    for request in requests:
        outputs[request.client_index].append(EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.ERROR))
    ids = {index: {output.request_id for output in found} for index, found in outputs.items()}
    return {index: EngineCoreOutputs(outputs=found, finished_requests=ids[index]) for index, found in outputs.items()}
