"""A delta between two checkpoint folders, applied to a transformers model that holds the first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from aliasparam import apply_delta, checkpoint_names
from aliasparam.reload.delta_folder import Chain, DeltaFolder
from aliasparam.reload.observe import Hooks
from aliasparam.reload.targets import find_targets

from .unwrap import plain_name, unwrapped


def apply_delta_folder(
    model: Any, delta: str | Path | DeltaFolder | Chain, *, serving: int | None = None, hooks: Hooks | None = None
) -> int:
    """:func:`aliasparam.apply_delta` by the names of the model's files; returns the version.

    Whole tensors alone: experts that are split between processes, and tensors that transformers makes of several, are refused.

    Args:
        model: loaded through this package's quantizer; compiled or wrapped, too.
        delta, serving, hooks: as there.

    Raises:
        AliasError: as there; the old weights serve.
    """
    model = unwrapped(model)
    return apply_delta(model, delta, serving=serving, names=names_of_files(model), hooks=hooks)


def names_of_files(model: nn.Module) -> dict[str, str]:
    """Name of each tensor in the files -> its place in the model."""
    places = {id(target.tensor): place for place, target in find_targets(model).items()}
    live = checkpoint_names(model)
    return {plain_name(name): places[id(tensor)] for name, tensor in live.items() if id(tensor) in places}
