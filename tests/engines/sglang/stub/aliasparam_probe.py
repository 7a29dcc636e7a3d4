"""What the tests look at inside a scheduler process: a plugin like any other, called by ``Engine.collective_rpc``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def register() -> None:
    from sglang.srt.managers.scheduler import Scheduler

    if os.environ.get("ALIASPARAM_PROBE_UNPINNED"):
        unpin()
    Scheduler.probe, Scheduler.invalidate_all = probe, invalidate_all


def probe(scheduler: Any, path: str) -> None:
    """Write what this rank serves to ``path``."""
    from sglang.srt.runtime_context import get_parallel

    from aliasparam import checkpoint_digest

    runner = scheduler.tp_worker.model_runner
    model = runner.model
    names = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    found = {
        "digest": checkpoint_digest(model).whole,
        "tensors": dict(checkpoint_digest(model).tensors),
        "addresses": {name: tensor.data_ptr() for name, tensor in names},
        "methods": sorted({type(m.quant_method).__name__ for m in model.modules() if getattr(m, "quant_method", None)}),
        "model_path": runner.model_config.model_path,
    }
    Path(f"{path}.{get_parallel().tp_rank}.json").write_text(json.dumps(found))


def invalidate_all(scheduler: Any) -> None:
    """Have every layer of this package refuse, as after an update that could not be taken back."""
    from aliasparam import invalidate

    invalidate(scheduler.tp_worker.model_runner.model)


def unpin() -> None:
    """Plain memory where pinned memory is asked for, which only a machine with an accelerator has."""
    import torch

    def made(make: Any) -> Any:
        return lambda *args, pin_memory=False, **kwargs: make(*args, **kwargs)

    for name in ("tensor", "empty", "zeros", "ones"):
        setattr(torch, name, made(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self: self
