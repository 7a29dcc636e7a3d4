"""Models that are wrapped: compiled, distributed, checkpointed. The wrapper puts a word into names and holds the model itself."""

from __future__ import annotations

import re

from torch import nn

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
