"""Sleep. Level 1 brings every byte back to its address, which needs nothing. Level 2 throws weights away and saves all buffers,
kernel names among them: as many bytes as the weights, and of no use, for they come back by a reload.

Seam: ``Worker.sleep`` of vllm/v1/worker/gpu_worker.py; tried on 0.32.0 with a stand-in for the allocator, which is CUDA's.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.v1.worker.gpu_worker import Worker

from aliasparam import invalidate

from ..serving import kernel_names
from .patching import replace


def sleep_without_kernel_names() -> None:
    replace(Worker, "sleep", _sleeping)


def _sleeping(original: Any) -> Any:
    def sleep(self: Any, level: int = 1) -> None:
        if level != 2:
            original(self, level)
            return
        models = [m for m in (self.model_runner.model, self.get_draft_model()) if m is not None]
        for model in models:
            _hide_kernel_names(model)
            invalidate(model)  # nothing runs before a whole reload
        try:
            original(self, level)
        finally:
            for model in models:
                model.__dict__.pop("named_buffers", None)

    return sleep


def _hide_kernel_names(model: nn.Module) -> None:
    """``model.named_buffers()`` leaves kernel names out, until the attribute is deleted."""
    kernel = kernel_names(model)

    def named_buffers(*args: Any, **kwargs: Any) -> Any:
        return ((n, b) for n, b in nn.Module.named_buffers(model, *args, **kwargs) if n not in kernel)

    model.__dict__["named_buffers"] = named_buffers
