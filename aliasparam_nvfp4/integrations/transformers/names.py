"""Models and their files do not always agree on names: transformers loads ``block_sparse_moe`` of Mixtral as ``mlp``.

[Note: the state dict says the files' names] A model that was loaded here speaks the names of its checkpoint in ``state_dict``
and understands them in ``load_state_dict``, by torch's own hooks. So export, reload and saving need no mapping of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming


def renamed(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """What ``model`` calls each name of its files, by transformers' own renamings."""
    renamings = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    found = {}
    for name in names:
        ours = name
        for renaming in renamings:
            ours = renaming.rename_source_key(ours)[0]
        found[name] = ours
    return found


def speak_file_names(model: nn.Module, ours: Mapping[str, str]) -> None:
    """Make the state dict of ``model`` say the files' names. See [Note: the state dict says the files' names].

    Args:
        model: the whole model.
        ours: file name to the model's own name.
    """
    differing = {theirs: mine for theirs, mine in ours.items() if theirs != mine}
    if differing:
        model.register_state_dict_post_hook(_Saving(differing))  # type: ignore[no-untyped-call]
        model.register_load_state_dict_pre_hook(_Loading(differing))  # type: ignore[no-untyped-call]


class _Saving:
    def __init__(self, ours: dict[str, str]) -> None:
        self.theirs = {mine: theirs for theirs, mine in ours.items()}

    def __call__(self, module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        _rename(state, prefix, self.theirs)


class _Loading:
    def __init__(self, ours: dict[str, str]) -> None:
        self.ours = ours

    def __call__(self, module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        _rename(state, prefix, self.ours)


def _rename(state: dict[str, Tensor], prefix: str, names: Mapping[str, str]) -> None:
    """In place, and in the order that was."""
    if not any(f"{prefix}{old}" in state for old in names):
        return
    items = list(state.items())
    state.clear()
    for name, tensor in items:
        rest = name.removeprefix(prefix)
        state[f"{prefix}{names.get(rest, rest)}" if name.startswith(prefix) else name] = tensor
