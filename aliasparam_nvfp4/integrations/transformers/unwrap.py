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
    """The model inside any wrappers: ``torch.compile(model)``, DistributedDataParallel, DataParallel, FSDP, and a module of the
    caller's own that holds one quantized transformers model.

    Raises:
        CheckpointError: no module, or one that holds several such models.
    """
    if not isinstance(model, nn.Module):
        raise CheckpointError(
            "this is no module",
            expected="a model, compiled or wrapped",
            found=type(model).__name__,
            remedy="torch.compile of what is compiled already returns a function: pass the model inside.",
        )
    while (inner := _inner(model)) is not None:
        model = inner
    return model


def _inner(model: nn.Module) -> nn.Module | None:
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return model.module  # type: ignore[no-any-return]
    known = next((model._modules[name] for name in _HOLDERS if name in model._modules), None)
    if known is not None or _is_quantized(model):
        return known
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if _is_quantized(module) and not any(path.startswith(f"{above}.") for above in found):
            found[path] = module
    if len(found) > 1:
        raise CheckpointError("this module holds several quantized models", found=", ".join(found), remedy="Pass one of them.")
    return next(iter(found.values()), None)


def _is_quantized(module: nn.Module) -> bool:
    return getattr(getattr(module, "config", None), "quantization_config", None) is not None


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
