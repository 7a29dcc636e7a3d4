"""``register``: what SGLang's plugin loader calls in every process, before any model is made."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ..plugins import SGLANG

_logger = logging.getLogger(__name__)
_MODELOPT = "sglang.srt.layers.quantization.modelopt_quant"
_LOADER = "sglang.srt.model_loader.loader"
_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
_COMPONENTS = "sglang.srt.managers.scheduler_components"
_MANAGER = f"{_COMPONENTS}.weight_updater"


def hooks() -> dict[str, Callable[..., Any]]:
    """Every seam and what goes around it, tried on SGLang 0.5.23."""
    from . import checker, eplb, failed_step, linear, moe, served, sleep, update

    manager = f"{_MANAGER}.SchedulerWeightUpdaterManager"
    return {
        f"{_MODELOPT}.ModelOptFp4LinearMethod.__init__": linear.take_over,
        f"{_MODELOPT}.ModelOptNvFp4A16LinearMethod.__init__": linear.take_over,
        f"{_MODELOPT}.ModelOptNvFp4FusedMoEMethod.__init__": moe.take_over,
        f"{_LOADER}.DefaultModelLoader.load_weights_only": served.record,
        f"{_UPDATER}.update_weights_from_disk": update.from_disk,
        f"{_UPDATER}.begin_weight_update": update.begin,
        f"{_UPDATER}.update_weights_from_tensor": update.receive,
        f"{_UPDATER}.load_weights_from_distributed": update.receive,
        f"{_UPDATER}.end_weight_update": update.end,
        f"{manager}.begin_weight_update": update.begin_session,
        f"{manager}.end_weight_update": update.end_session,
        f"{manager}.resume_memory_occupation": sleep.resume,
        f"{_MANAGER}._export_static_state": sleep.export_state,
        "sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation": failed_step.forward,
        f"{_COMPONENTS}.batch_result_processor.SchedulerBatchResultProcessor.process_batch_result_decode": failed_step.decode,
        "sglang.srt.eplb.expert_location_updater.ExpertLocationUpdater.update": eplb.update,
        "sglang.srt.utils.weight_checker.WeightChecker._model_state": checker.model_state,
    }


def register() -> None:
    """Hook our methods and updates in, which ``sglang/srt/plugins/hook_registry.py`` then applies. May be called again.

    Nothing but one line in the log with a version of SGLang that is not known."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if (reason := SGLANG.doubt()) is not None:
        _logger.warning("aliasparam_nvfp4 is not in place: %s", reason)
        return
    for target, hook in hooks().items():
        if all(registered is not hook for _, registered, _ in HookRegistry._hooks.get(target, ())):
            HookRegistry.register(target, hook, HookType.AROUND)
