"""Whether this package is really in place: vLLM only logs plugins that fail, and serves by its own methods then.

Seam: ``Worker.load_model`` of vllm/v1/worker/gpu_worker.py; tried on 0.32.0.
"""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.worker.gpu_worker import Worker

from ..serving import said_of
from .patching import replace

logger = init_logger("vllm.aliasparam_nvfp4")
#: vLLM's names of configs whose checkpoints can be ours.
_NVFP4 = ("modelopt_fp4", "modelopt_mixed", "compressed-tensors")


def say_what_serves() -> None:
    replace(Worker, "load_model", _loading)


def _loading(original: Any) -> Any:
    def load_model(self: Any, **kwargs: Any) -> None:
        original(self, **kwargs)
        line, kind = said_of(self.model_runner.get_model()), self.model_config.quantization
        if line is not None:
            logger.info(line)
        elif kind in _NVFP4:
            logger.warning("aliasparam_nvfp4 serves none of this %s checkpoint: none of its layers are NVFP4 it knows", kind)

    return load_model


def missing_seams() -> list[str]:
    """What :func:`register` should have replaced in vLLM and did not, or what somebody replaced after it."""
    from vllm.distributed.eplb import rebalance_execute
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.quantization import modelopt
    from vllm.model_executor.model_loader.reload import inplace, layerwise
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc

    from .experts import ModelOptNvFp4Experts
    from .patching import is_replaced

    functions: dict[Any, tuple[str, ...]] = {
        layerwise: (
            "capture_layer_to_meta", "restore_layer_on_meta", "initialize_online_processing", "make_online_process_loader",
            "initialize_layerwise_reload", "finalize_layerwise_reload",
        ),
        inplace: ("reload_weights", "initialize_layerwise_reload", "finalize_layerwise_reload"),
        WeightTransferEngine: ("reset_weight_update_target",),
        Worker: ("load_model", "sleep", "_start_weight_update", "finish_weight_update"),
        EngineCore: ("step", "step_with_batch_queue"),
        MultiprocExecutor: ("collective_rpc",),
        WorkerProc: ("enqueue_output",),
        RoutedExperts: ("get_expert_weights",),
        rebalance_execute: ("move_from_buffer",),
    }  # fmt: skip
    missing = [f"{m.__name__}.{n}" for m, names in functions.items() for n in names if not is_replaced(m, n)]
    if "NVFP4" not in modelopt.LINEAR_METHOD_BUILDERS:
        missing.append("modelopt.LINEAR_METHOD_BUILDERS['NVFP4']")
    if modelopt.ModelOptNvFp4Config.FusedMoEMethodCls is not ModelOptNvFp4Experts:
        missing.append("ModelOptNvFp4Config.FusedMoEMethodCls")
    return missing
