"""A forward that refuses fails its requests, not the engine.

After a reload that failed without its old weights the model refuses until a whole reload. Left alone, vLLM's engine process
dies of it, and in-process the request stays scheduled and fails at every later step. Seams: ``EngineCore.step`` and
``step_with_batch_queue`` of vllm/v1/engine/core.py; and ``WorkerProc.enqueue_output`` of vllm/v1/executor/multiproc_executor.py,
by which a worker sends an error to the engine as its text alone; tried on 0.32.0.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from vllm.logger import init_logger
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.multiproc_executor import WorkerProc
from vllm.v1.request import RequestStatus

from aliasparam.errors import StateError

from .patching import replace

logger = init_logger("vllm.aliasparam_nvfp4")
#: What the text of a refusal that a worker sends begins with, and what torch.compile says where it meets one while it traces.
_SENT, _TRACED = "aliasparam_nvfp4 refused: ", "a kernel-format name is open"


def fail_requests_of_refused_steps() -> None:
    for name in ("step", "step_with_batch_queue"):
        replace(EngineCore, name, _guarded)
    replace(WorkerProc, "enqueue_output", _sending)


def is_refusal(error: BaseException | None) -> bool:
    """Whether the model refused to run; what went wrong otherwise is vLLM's to judge."""
    while error is not None:
        if isinstance(error, StateError) or _SENT in str(error) or _TRACED in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _sending(original: Any) -> Any:
    def enqueue_output(self: Any, output: Any) -> None:
        original(self, RuntimeError(f"{_SENT}{output}") if isinstance(output, Exception) and is_refusal(output) else output)

    return enqueue_output


def _guarded(original: Any) -> Any:
    def step(self: Any) -> Any:
        try:
            return original(self)
        except Exception as error:
            if not is_refusal(error):
                raise
            return failed(self, error), False

    return step


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
