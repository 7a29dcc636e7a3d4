"""``register``: what vLLM calls in every process; and every seam."""

from __future__ import annotations

import logging
from typing import Any

from ..hooking import Hook, becomes, put_in_place, say_what_serves
from ..plugins import VLLM

logger = logging.getLogger("vllm.aliasparam_nvfp4")
_LAYERS = "vllm.model_executor.layers"
_MODELOPT = f"{_LAYERS}.quantization.modelopt"
_COMPRESSED = f"{_LAYERS}.quantization.compressed_tensors"
_RELOAD = "vllm.model_executor.model_loader.reload"
_WORKER = "vllm.v1.worker.gpu_worker.Worker"
_ENGINE = "vllm.v1.engine.core.EngineCore"
_EXECUTOR = "vllm.v1.executor.multiproc_executor"
_TRANSFER = "vllm.distributed.weight_transfer"
#: vLLM's names of configs whose checkpoints can be ours.
_NVFP4 = ("modelopt_fp4", "modelopt_mixed", "compressed-tensors")


def hooks() -> dict[str, Hook]:
    """Every function of vLLM that is replaced, and what goes around it; tried on 0.32.0, and the same text in 0.33.0 where
    a file of ours says so."""
    from . import answers, balance, compressed, experts, failed_step, layerwise, linear, reload, sleep, ties, transfer

    return {
        f"{_MODELOPT}.build_linear_method": linear.build,
        f"{_MODELOPT}.ModelOptNvFp4FusedMoE.__init__": becomes(experts.ModelOptNvFp4Experts),
        f"{_COMPRESSED}.schemes.CompressedTensorsW4A4Fp4.__init__": becomes(compressed.NvFp4Scheme),
        f"{_COMPRESSED}.compressed_tensors.CompressedTensorsConfig.get_quant_method": compressed.get_quant_method,
        f"{_COMPRESSED}.compressed_tensors_moe.compressed_tensors_moe_w4a4_nvfp4.CompressedTensorsW4A4Nvfp4MoEMethod.__init__": (
            becomes(compressed.CompressedTensorsNvFp4Experts)
        ),
        f"{_RELOAD}.layerwise.record_metadata_for_reloading": ties.record,
        f"{_RELOAD}.layerwise.capture_layer_to_meta": layerwise.capture,
        f"{_RELOAD}.layerwise.restore_layer_on_meta": layerwise.leave_out,
        f"{_RELOAD}.layerwise.initialize_online_processing": layerwise.leave_out,
        f"{_RELOAD}.layerwise.make_online_process_loader": layerwise.make_loader,
        f"{_RELOAD}.layerwise.initialize_layerwise_reload": reload.initialize,
        f"{_RELOAD}.layerwise.finalize_layerwise_reload": reload.finalize,
        f"{_RELOAD}.inplace.initialize_layerwise_reload": reload.initialize,
        f"{_RELOAD}.inplace.finalize_layerwise_reload": reload.finalize,
        f"{_RELOAD}.inplace.reload_weights": reload.reload_weights,
        f"{_TRANSFER}.base.WeightTransferEngine.reset_weight_update_target": transfer.reset,
        f"{_WORKER}._start_weight_update": transfer.start,
        f"{_WORKER}.finish_weight_update": transfer.finish,
        f"{_WORKER}.load_model": loaded,
        f"{_WORKER}.sleep": sleep.sleep,
        f"{_WORKER}.execute_model": failed_step.execute_model,
        f"{_ENGINE}.step": failed_step.step,
        f"{_ENGINE}.step_with_batch_queue": failed_step.step,
        f"{_EXECUTOR}.WorkerProc.enqueue_output": failed_step.enqueue_output,
        f"{_EXECUTOR}.MultiprocExecutor.collective_rpc": answers.collective_rpc,
        f"{_LAYERS}.fused_moe.routed_experts.RoutedExperts.get_expert_weights": balance.get_expert_weights,
        "vllm.distributed.eplb.rebalance_execute.move_from_buffer": balance.move_from_buffer,
    }


def register() -> None:
    """Put this package's methods and its reload in place of vLLM's for NVFP4. Does nothing the second time."""
    if put_in_place(VLLM, hooks, logger):
        from .transfer import register_engine

        register_engine()


def loaded(original: Any, worker: Any, **kwargs: Any) -> None:
    """AROUND ``Worker.load_model``."""
    original(worker, **kwargs)
    kind = worker.model_config.quantization
    if not say_what_serves(worker.model_runner.get_model(), logger) and kind in _NVFP4:
        logger.warning("aliasparam_nvfp4 serves none of this %s checkpoint: none of its layers are NVFP4 it knows", kind)
