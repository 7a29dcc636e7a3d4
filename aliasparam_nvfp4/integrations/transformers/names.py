"""Models and their files do not always agree on names: transformers loads ``block_sparse_moe`` of Mixtral as ``mlp``.

[Note: the state dict says the files' names] A model that was loaded here speaks the names of its checkpoint in ``state_dict``
and understands them in ``load_state_dict``, by torch's own hooks. So export, reload and saving need no mapping of their own. What
transformers converts is converted back, except where live tensors are asked for (``keep_vars=True``): those are the model's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from ...checkpoint import ExpertTensorName
from .conversions import Conversion
from .unwrap import plain_name


@dataclass(frozen=True)
class Names:
    """What a model calls the tensors of its files, by transformers' own rules.

    Attributes:
        ours: name in the files to name in the model, of all that is not converted.
        conversions: the rest.
    """

    ours: Mapping[str, str] = field(default_factory=dict)
    conversions: Sequence[Conversion] = ()

    @classmethod
    def of(cls, model: Any, names: Iterable[str]) -> Names:
        """For a model in which nothing was replaced yet."""
        transforms = get_model_conversion_mapping(model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        places, prefix = _Places(model), model.base_model_prefix
        ours: dict[str, str] = {}
        groups: dict[str, Conversion] = {}
        for name in sorted(names, key=dot_natural_key):  # some renamings go by the order
            mine, _ = rename_source_key(name, renamings, [], prefix, places)
            if ExpertTensorName.parse(mine) is None:
                target, pattern = rename_source_key(name, renamings, converters, prefix, places)
                if pattern is not None and target in places.state:
                    group = groups.setdefault(target, Conversion(by_pattern[pattern], target))
                    group.sources[name] = mine, pattern
                    continue
            if places.get(mine) is None and places.get(name) is not None:
                mine, _ = rename_source_key(name, [], [], prefix, places)
            if mine not in places.state and (beside := mine.removeprefix(f"{prefix}.")) in places.state:
                mine = beside  # the model's own tensor: the base model has a place for any name
            ours[name] = mine
        return cls(ours, tuple(groups.values()))


class _Places:
    """The state dict that transformers looks names up in, as it will be when quantized modules are in their places."""

    def __init__(self, model: nn.Module) -> None:
        self.state = set(model.state_dict())
        self._modules = {path for path, _ in model.named_modules() if path}

    def get(self, name: str) -> bool | None:
        if name in self.state:
            return True
        expert = ExpertTensorName.parse(name)
        holder = expert.layer if expert else name.rpartition(".")[0]
        return True if holder in self._modules else None


def speak_file_names(model: nn.Module, names: Names) -> None:
    """Make the state dict of ``model`` say the files' names. See [Note: the state dict says the files' names].

    Args:
        model: the whole model.
        names: of its files.
    """
    differing = {theirs: mine for theirs, mine in names.ours.items() if theirs != mine}
    if differing or names.conversions:
        model.register_state_dict_post_hook(_Saving(differing, names.conversions))  # type: ignore[no-untyped-call]
        model.register_load_state_dict_pre_hook(_Loading(differing, names.conversions))  # type: ignore[no-untyped-call]


class _Saving:
    def __init__(self, ours: dict[str, str], conversions: Sequence[Conversion]) -> None:
        self.theirs = {mine: theirs for theirs, mine in ours.items()}
        self.conversions = conversions

    def __call__(self, module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        _rename(state, prefix, self.theirs)
        if not any(isinstance(tensor, nn.Parameter) for tensor in state.values()):
            revert(module, state, self.conversions, prefix)


def revert(model: nn.Module, state: dict[str, Tensor], conversions: Sequence[Conversion], prefix: str = "") -> None:
    """Put the files' tensors in the place of what transformers converted, in a state dict of plain tensors."""
    for conversion in conversions:
        held = {name: state[f"{prefix}{name}"] for name in conversion.targets if f"{prefix}{name}" in state}
        if len(held) == len(conversion.targets):
            for name in held:
                del state[f"{prefix}{name}"]
            state |= {f"{prefix}{name}": tensor for name, tensor in conversion.revert(model, held).items()}


class _Loading:
    def __init__(self, ours: dict[str, str], conversions: Sequence[Conversion]) -> None:
        self.ours = ours
        self.conversions = conversions

    def __call__(self, module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        _rename(state, prefix, self.ours)
        for conversion in self.conversions:
            names = {name: f"{prefix}{name}" for name in conversion.sources}
            if all(name in state for name in names.values()):
                converted = conversion.convert(module, {name: state.pop(full) for name, full in names.items()})
                state |= {f"{prefix}{name}": tensor for name, tensor in converted.items()}


def _rename(state: dict[str, Tensor], prefix: str, names: Mapping[str, str]) -> None:
    """In place, and in the order that was."""
    if not names:
        return
    items = list(state.items())
    state.clear()
    for name, tensor in items:
        rest = name.removeprefix(prefix)
        new = names.get(rest) or names.get(plain_name(rest)) or rest
        state[f"{prefix}{new}" if name.startswith(prefix) else name] = tensor
