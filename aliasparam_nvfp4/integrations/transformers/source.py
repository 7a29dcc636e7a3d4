"""The folder that a model is being loaded from, seen with the model's own names, and held against the model first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter

from aliasparam import TensorSpec

from ...checkpoint import CheckpointFolder, ExpertTensorName, ExpertTensors, TensorEntry, check_tensors, expert_layers
from .experts import Experts, fused_experts
from .kv_scales import KV_SCALES
from .names import renamed

#: float32 tensors whose dtype in the file must be the model's.
_SCALARS = ("_scale_2", "_global_scale", "input_scale", *KV_SCALES)


def castable(name: str, spec: TensorSpec, stored: Mapping[str, TensorEntry]) -> TensorSpec:
    """What the files must have for a tensor of the model: quantized tensors and their scales as they are; all other floats in any
    dtype of two bytes or more, because the user chooses in which the model is served."""
    dtype = stored[name].dtype if name in stored else spec.dtype
    free = all(d.is_floating_point and d.itemsize > 1 for d in (dtype, spec.dtype)) and not name.endswith(_SCALARS)
    return TensorSpec(spec.shape, dtype) if free else spec


@dataclass(frozen=True)
class Source:
    """Where weights come from while a model loads.

    Attributes:
        folder: opened; None for a model that is loaded from something else.
        ours: name in the files to name in the model.
        experts: the files' experts by the path of their module in the model.
    """

    folder: CheckpointFolder | None = None
    ours: Mapping[str, str] = field(default_factory=dict)
    experts: Mapping[str, ExpertTensors] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, path: Path) -> Source:
        """The folder at ``path`` for ``model``, which nothing was replaced in yet.

        Raises:
            CheckpointError: files that do not check, or an expert's tensor that is there twice.
        """
        folder = CheckpointFolder(path)
        ours = renamed(model, folder.tensors)
        layers = {}
        for tensors in expert_layers(folder.tensors).values():
            first = ExpertTensorName.parse(ours[next(iter(tensors.entries.values())).name])
            if first is not None:
                layers[first.layer] = tensors
        return cls(folder, ours, layers)

    def tensors(self) -> dict[str, TensorEntry]:
        """The files' tensors by the model's names."""
        return {self.ours[name]: entry for name, entry in self.folder.tensors.items()} if self.folder else {}

    def modules(self) -> dict[str, str]:
        """The files' name of each of the model's modules that has a tensor."""
        return {ours.rpartition(".")[0]: theirs.rpartition(".")[0] for theirs, ours in self.ours.items()}

    def plain_experts(self, model: nn.Module) -> list[str]:
        """Paths of the model's experts which are not quantized and have tensors of their own in the files."""
        return [path for path, _ in fused_experts(model) if path in self.experts]

    def renamed_dtypes(self, model: nn.Module) -> dict[str, torch.dtype]:
        """The dtypes of the model's wide floating-point parameters which the files call otherwise."""
        renamed = {mine for theirs, mine in self.ours.items() if theirs != mine}
        found = {name: p.dtype for name, p in model.named_parameters() if name in renamed}
        return {name: dtype for name, dtype in found.items() if dtype.is_floating_point and dtype.itemsize > 1}

    def check(self, model: Any) -> None:
        """Hold the files' headers against the model before anything is loaded.

        Raises:
            CheckpointError: lists all that is missing, unexpected or of another shape or dtype.
        """
        if self.folder is None:
            return
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        stored, theirs = self.folder.tensors, {mine: name for name, mine in self.ours.items()}
        fused = set()
        for path, module in list(model.named_modules()):
            if isinstance(module, Experts):
                module.check_headers(self.experts[path])
        for path in self.plain_experts(model):
            fused |= {f"{path}.{name}" for name in ("gate_up_proj", "down_proj")}
            _check_plain(model.get_submodule(path), self.experts[path])
        expected = {}
        for name, tensor in model.state_dict().items():
            if name in tied or name in fused:
                continue
            name = theirs.get(name, name)
            expected[name] = castable(name, TensorSpec.of(tensor), stored)
        own = {entry.name for layer in self.experts.values() for entry in layer.entries.values()}
        check_tensors(self.folder, expected, ignore=tied | own)


def _check_plain(experts: nn.Module, tensors: ExpertTensors) -> None:
    count, rows, hidden = experts.get_parameter("gate_up_proj").shape
    dtype = next(iter(tensors.entries.values())).dtype
    shapes = {"w1": (rows // 2, hidden), "w3": (rows // 2, hidden), "w2": (hidden, rows // 2)}
    tensors.need(count, {(shard, "weight"): TensorSpec(shape, dtype) for shard, shape in shapes.items()})


def narrowed(conversions: Iterable[Any], plain: Iterable[str]) -> list[Any]:
    """transformers' conversions, those of fused experts for the layers at the paths ``plain`` alone."""
    kept: list[Any] = []
    for conversion in conversions:
        targets = getattr(conversion, "target_patterns", ())
        if not isinstance(conversion, WeightConverter) or not any("experts." in target for target in targets):
            kept.append(conversion)
            continue
        sources = [pattern.partition("experts")[2] for pattern in conversion.source_patterns]
        ends = [target.partition("experts")[2] for target in targets]
        kept += [
            WeightConverter([path + s for s in sources], [path + t for t in ends], operations=conversion.operations)
            for path in plain
        ]
    return kept
