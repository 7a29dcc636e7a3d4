"""``register``: what SGLang's plugin loader calls in every process, before any model is made."""

from __future__ import annotations

import logging

from ..hooking import Hook, becomes, put_in_place
from ..plugins import SGLANG

_logger = logging.getLogger(__name__)
_MODELOPT = "sglang.srt.layers.quantization.modelopt_quant"
_LOADER = "sglang.srt.model_loader.loader"
_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
_COMPONENTS = "sglang.srt.managers.scheduler_components"
_MANAGER = f"{_COMPONENTS}.weight_updater"


def hooks() -> dict[str, Hook]:
    """Every seam and what goes around it, tried on SGLang 0.5.23."""
    from . import checker, eplb, failed_step, linear, moe, served, sleep, update

    manager = f"{_MANAGER}.SchedulerWeightUpdaterManager"
    return {
        f"{_MODELOPT}.ModelOptFp4LinearMethod.__init__": becomes(linear.AliasedFp4LinearMethod, linear.is_ours),
        f"{_MODELOPT}.ModelOptNvFp4A16LinearMethod.__init__": becomes(linear.AliasedFp4A16LinearMethod, linear.is_ours),
        f"{_MODELOPT}.ModelOptNvFp4FusedMoEMethod.__init__": becomes(moe.AliasedModelOptNvFp4FusedMoEMethod, moe.is_ours),
        f"{_LOADER}.DefaultModelLoader.load_weights_only": served.record,
        f"{_UPDATER}.update_weights_from_disk": update.from_disk,
        f"{_UPDATER}.begin_weight_update": update.begin,
        f"{_UPDATER}.update_weights_from_tensor": update.receive,
        f"{_UPDATER}.load_weights_from_distributed": update.receive,
        f"{_UPDATER}.end_weight_update": update.end,
        f"{manager}.begin_weight_update": update.answered("BeginWeightUpdateReqOutput"),
        f"{manager}.end_weight_update": update.answered("EndWeightUpdateReqOutput"),
        f"{manager}.resume_memory_occupation": sleep.resume,
        f"{_MANAGER}._export_static_state": sleep.export_state,
        "sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation": failed_step.forward,
        "sglang.srt.managers.tp_worker.BaseTpWorker.forward_batch_embedding": failed_step.embed,
        f"{_COMPONENTS}.batch_result_processor.SchedulerBatchResultProcessor.process_batch_result_decode": failed_step.decode,
        "sglang.srt.eplb.expert_location_updater.ExpertLocationUpdater.update": eplb.update,
        "sglang.srt.utils.weight_checker.WeightChecker._model_state": checker.model_state,
    }


def register() -> None:
    """Put our methods and updates in place of SGLang's. Does nothing the second time."""
    put_in_place(SGLANG, hooks, _logger)
