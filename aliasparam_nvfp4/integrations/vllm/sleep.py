"""Sleep. Level 1 brings every byte back to its address, which needs nothing. Level 2 throws weights away and saves all buffers,
kernel names among them: as many bytes as the weights, and of no use, for they come back by a reload.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from aliasparam import invalidate

from ..serving import without_kernel_names


def sleep(original: Any, worker: Any, level: int = 1) -> None:
    """AROUND ``Worker.sleep`` (vllm/v1/worker/gpu_worker.py, 0.32.0; with a stand-in for the allocator, which is CUDA's)."""
    if level != 2:
        original(worker, level)
        return
    models = [m for m in (worker.model_runner.model, worker.get_draft_model()) if m is not None]
    for model in models:
        _hide_kernel_names(model)
        invalidate(model)  # nothing runs before a whole reload
    try:
        original(worker, level)
    finally:
        for model in models:
            model.__dict__.pop("named_buffers", None)


def _hide_kernel_names(model: nn.Module) -> None:
    """``model.named_buffers()`` leaves kernel names out, until the attribute is deleted."""
    named = functools.partial(nn.Module.named_buffers, model)
    model.__dict__["named_buffers"] = lambda *args, **kwargs: without_kernel_names(model, named(*args, **kwargs))
