"""Models that are wrapped: compiled, distributed, checkpointed. The wrapper puts a word into names and holds the model itself."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...checkpoint import CheckpointError

#: torch.compile, FSDP, activation checkpointing.
_WORDS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_HOLDERS = ("_orig_mod", "_fsdp_wrapped_module")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside any wrappers: ``torch.compile(model)``, DistributedDataParallel, DataParallel, FSDP."""
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        inner = next((model._modules[name] for name in _HOLDERS if name in model._modules), None)
        if isinstance(model, parallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def plain_name(name: str) -> str:
    """A parameter's or module's name without the words of wrappers inside the model."""
    return _WORDS.sub("", f"{name}.").removesuffix(".")


def need_whole(live: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for parameters of which this process has a part (FSDP2): a folder holds whole tensors."""
    tensors: Any = sys.modules.get("torch.distributed.tensor")  # who has a DTensor has imported it
    divided = [name for name, tensor in live.items() if tensors is not None and isinstance(tensor, tensors.DTensor)]
    if divided:
        raise CheckpointError(
            "parameters of this model are divided among ranks, and a folder is reloaded into whole ones",
            name=f"{divided[0]}{f' and {len(divided) - 1} more' if len(divided) > 1 else ''}",
            expected="tensors that are whole in every process",
            found="DTensor",
            remedy="Wrap with fully_shard(model, ignored_params=set(model.parameters())).",
        )
