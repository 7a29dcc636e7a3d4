"""Tensors that transformers converts at load: a vision tower's ``wqkv`` is cut into q, k and v, a list is stacked, and so on.

The operations are transformers' own (``core_model_loading.py``, ``WeightConverter``), forward at load and reload, backward when
the state dict is to say what the files say.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from aliasparam import TensorSpec

from ...checkpoint import CheckpointError


@dataclass
class Conversion:
    """Some tensors of the files which become others of the model.

    Attributes:
        converter: transformers' ``WeightConverter``.
        target: the model's name by which it knows this group.
        sources: name in the files to (the name that the converter sees, the pattern of it which matched).
        targets: the model's names of the results, known once :meth:`specs` or :meth:`convert` ran.
    """

    converter: Any
    target: str
    sources: dict[str, tuple[str, str]] = field(default_factory=dict)
    targets: tuple[str, ...] = ()

    def convert(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors from those of the files.

        Raises:
            CheckpointError: transformers cannot convert these.
        """
        given = {name: (self.target, pattern, tensors[name]) for name, (_, pattern) in self.sources.items()}
        return self._run(model, copy.deepcopy(self.converter), given)

    def revert(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The files' tensors from those of the model."""
        reverse = self.converter.reverse_transform()
        given = {}
        for name in self.targets:
            key, pattern = reverse.rename_source_key(name)
            given[name] = key, pattern, tensors[name]
        found = self._run(model, reverse, given)
        theirs = {seen: name for name, (seen, _) in self.sources.items()}
        return {theirs[name]: tensor for name, tensor in found.items()}

    def specs(self, model: nn.Module, stored: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """What the files' tensors give, from headers alone."""
        empty = {name: torch.empty(stored[name].shape, dtype=stored[name].dtype, device="meta") for name in self.sources}
        found = {name: TensorSpec.of(tensor) for name, tensor in self.convert(model, empty).items()}
        self.targets = tuple(found)
        return found

    def _run(self, model: nn.Module, converter: Any, given: Mapping[str, tuple[str, str, Tensor]]) -> dict[str, Tensor]:
        try:
            for name, (key, pattern, tensor) in given.items():
                converter.add_tensor(key, name, pattern, tensor)
            found = converter.convert(next(iter(given.values()))[0], model=model, config=model.config)
        except Exception as error:
            raise CheckpointError(
                "transformers cannot convert these tensors",
                name=", ".join(list(given)[:3]),
                expected=f"what {converter} takes",
                found=f"{type(error).__name__}: {error}"[:200],
            ) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}
