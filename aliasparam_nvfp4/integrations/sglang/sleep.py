"""``release_memory_occupation`` and ``resume_memory_occupation``.

SGLang saves every buffer while weights sleep, and copies it back: of our layers that would be a second copy of all weights, and
writes into kernel names by other code. Kernel names are neither saved nor written here; where their memory was given back
(torch_memory_saver without a CPU backup) they refuse until weights are loaded again.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from aliasparam.module.registry import registries

from ..serving import without_kernel_names


def export_state(original: Any, model: nn.Module) -> Any:
    """AROUND ``_export_static_state`` (``sglang/srt/managers/scheduler_components/weight_updater.py``, 0.5.23)."""
    return {"buffers": [(name, b.detach().clone()) for name, b in without_kernel_names(model, model.named_buffers())]}


def resume(original: Any, manager: Any, request: Any) -> Any:
    """AROUND ``SchedulerWeightUpdaterManager.resume_memory_occupation``."""
    from sglang.srt.constants import GPU_MEMORY_TYPE_WEIGHTS

    answer = original(manager, request)
    weights = not request.tags or GPU_MEMORY_TYPE_WEIGHTS in request.tags
    if weights and getattr(manager.memory_saver_adapter, "enabled", False) and not _is_backed_up():
        for _, registry in registries(manager.tp_worker.model_runner.model):
            for storage in registry.storages():
                storage.invalidate("the engine gave the memory back while it slept: load the weights again")
    return answer


def _is_backed_up() -> bool:
    from sglang.srt.runtime_context import get_server_args

    return bool(get_server_args().enable_weights_cpu_backup)
