"""The folder that a model is being loaded from, seen with the model's own names, and held against the model first."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter

from aliasparam import TensorSpec
from aliasparam.spec import is_wide

from ...checkpoint import (
    CheckpointFolder,
    ExpertTensorName,
    ExpertTensors,
    QuantConfig,
    TensorEntry,
    check_tensors,
    expert_layers,
)
from ...checkpoint.format import KV_SCALES
from ...checkpoint.scheme import Scheme
from .carried import INPUT_SCALES, TELLING
from .dropped import dropping_rule
from .experts import Experts, first_projection, fused_experts
from .files_read import need_same_files
from .names import Names
from .report import FolderReport
from .ties import tied_names

#: float32 tensors whose dtype in the file must be the model's.
_SCALARS = ("_scale_2", "_global_scale", "input_scale", *KV_SCALES)


def castable(name: str, spec: TensorSpec, stored: Mapping[str, TensorEntry]) -> TensorSpec:
    """What the files must have for a tensor of the model: quantized tensors and their scales as they are; all other floats in any
    dtype of two bytes or more, because the user chooses in which the model is served."""
    dtype = stored[name].dtype if name in stored else spec.dtype
    free = is_wide(dtype) and is_wide(spec.dtype) and not name.endswith(_SCALARS)
    return TensorSpec(spec.shape, dtype) if free else spec


def check_names(
    model: Any, folder: CheckpointFolder, names: Names, expected: Mapping[str, TensorSpec], experts: Collection[str]
) -> dict[str, str]:
    """Hold the files' tensors against the model's.

    Args:
        model: unwrapped.
        folder: opened.
        names: what the model calls the files' tensors.
        expected: what the files must have.
        experts: names of experts' tensors, which have a check of their own.

    Returns:
        What the files have besides, and the rule by which the model does without it.

    Raises:
        CheckpointError: lists all that is missing, unexpected or does not fit.
    """
    ours = {name: names.ours.get(name, name) for name in folder.tensors}
    tied = tied_names(model, names.ours)
    ignored = {*experts, *tied, *(name for conversion in names.conversions for name in conversion.sources)}
    rule = dropping_rule(model, ours)
    unknown = {name: mine for name, mine in ours.items() if name not in expected and name not in ignored}
    dropped = {name: why for name, mine in unknown.items() if (why := rule(name, mine)) is not None}
    check_tensors(folder, expected, ignore={*ignored, *dropped})
    return dropped


@dataclass(frozen=True)
class Source:
    """Where weights come from while a model loads.

    Attributes:
        folder: opened; None for a model that is loaded from something else.
        names: what the model calls the files' tensors.
        experts: the files' experts by the path of their module in the model.
        tensors: the files' tensors by the model's names; of what transformers converts, the results.
    """

    folder: CheckpointFolder | None = None
    names: Names = field(default_factory=Names)
    experts: Mapping[str, ExpertTensors] = field(default_factory=dict)
    tensors: Mapping[str, TensorEntry] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, path: Path, files: Iterable[str | Path] | None = None) -> Source:
        """The folder at ``path`` for ``model``, which nothing was replaced in yet.

        Args:
            model: on the meta device.
            path: of the folder.
            files: that transformers reads, see :func:`need_same_files`.

        Raises:
            CheckpointError: files that do not check, an expert's tensor that is there twice, or what cannot be converted.
        """
        folder = CheckpointFolder(path)
        need_same_files(folder, files)
        names = Names.of(model, folder.tensors)
        tensors = {mine: folder.tensors[theirs] for theirs, mine in names.ours.items()}
        for conversion in names.conversions:
            file = folder.tensors[next(iter(conversion.sources))].file
            specs = conversion.specs(model, {name: folder.tensors[name].spec for name in conversion.sources})
            tensors |= {name: TensorEntry(name, file, spec.dtype, spec.shape) for name, spec in specs.items()}
        layers = {}
        for found in expert_layers(folder.tensors).values():
            first = ExpertTensorName.parse(names.ours.get(next(iter(found.entries.values())).name, ""))
            if first is not None:
                layers[first.layer] = found
        return cls(folder, names, layers, tensors)

    def modules(self) -> dict[str, str]:
        """The files' name of each of the model's modules that has a tensor."""
        found = {ours.rpartition(".")[0]: theirs.rpartition(".")[0] for theirs, ours in self.names.ours.items()}
        for conversion in self.names.conversions:
            theirs = next(iter(conversion.sources)).rpartition(".")[0]
            found |= {name.rpartition(".")[0]: theirs for name in conversion.targets}
        return found

    def scheme_of(self, config: QuantConfig, theirs: str, ours: str) -> Scheme | None:
        """How one linear module is quantized: as the config says, where the files do not say otherwise.

        Files say otherwise where the weight is wide and has no scale: exporters list parents whose parts they left alone, and the
        other way round.
        """
        return config.scheme_of(theirs, ours, fp4=self._is_fp4(ours), stored=self._has_input_scale(ours))

    def is_plain(self, module: str) -> bool:
        """Whether the files have the module's weight as it is, without scales."""
        weight = self.tensors.get(f"{module}.weight")
        return weight is not None and is_wide(weight.dtype) and f"{module}.weight_scale" not in self.tensors

    def is_absent(self, module: str) -> bool:
        """Whether the files have no weight of it."""
        return f"{module}.weight" not in self.tensors and f"{module}.weight_packed" not in self.tensors

    def _is_fp4(self, module: str) -> bool | None:
        weight = self.tensors.get(f"{module}.weight_packed") or self.tensors.get(f"{module}.weight")
        kinds = {torch.uint8: True, torch.float8_e4m3fn: False}
        return kinds.get(weight.dtype) if weight is not None else None

    def _has_input_scale(self, module: str) -> bool:
        return any(f"{module}.{name}" in self.tensors for name in TELLING)

    def schemes_of_experts(self, config: QuantConfig, path: str) -> set[Scheme | None]:
        """The schemes of all projections of the experts at ``path``."""
        tensors = self.experts.get(path)
        if tensors is None:
            fused = self.tensors.get(f"{path}.gate_up_proj")
            if fused is not None and is_wide(fused.dtype):
                return {None}
            return {config.scheme_of(self.modules().get(path, path), path, stored=self._has_input_scale(path))}
        found: set[Scheme | None] = set()
        scaled = any(suffix in INPUT_SCALES for _, _, suffix in tensors.entries)
        for theirs in tensors.projections():
            ours = self._ours(theirs)
            packed = self._is_fp4(ours)
            found.add(None if self.is_plain(ours) else config.scheme_of(theirs, ours, fp4=packed, stored=scaled))
        return found

    def _ours(self, module: str) -> str:
        for leaf in ("weight", "weight_packed"):
            if (name := self.names.ours.get(f"{module}.{leaf}")) is not None:
                return name.rpartition(".")[0]
        return module

    def plain_experts(self, model: nn.Module) -> list[str]:
        """Paths of the model's experts which are not quantized and have tensors of their own in the files."""
        return [path for path, _ in fused_experts(model) if path in self.experts]

    def renamed_dtypes(self, model: nn.Module) -> dict[str, torch.dtype]:
        """The dtypes of the model's wide floating-point parameters which the files call otherwise."""
        renamed = {mine for theirs, mine in self.names.ours.items() if theirs != mine}
        return {name: p.dtype for name, p in model.named_parameters() if name in renamed and is_wide(p.dtype)}

    def check(self, model: Any, carried: Iterable[str] = (), unquantized: Iterable[str] = ()) -> FolderReport:
        """Hold the files' headers against the model before anything is loaded.

        Args:
            model: with quantized modules in their places.
            carried: the model's names of what nothing computes with.
            unquantized: modules which the files do not quantize although the config does.

        Raises:
            CheckpointError: lists all that is missing, unexpected or of another shape or dtype.
        """
        if self.folder is None:
            return FolderReport()
        tied = tied_names(model, self.names.ours)
        theirs = {mine: name for name, mine in self.names.ours.items()}
        fused = self._check_experts(model)
        converted = {name for conversion in self.names.conversions for name in conversion.targets}
        optional = _patterns(model._keys_to_ignore_on_load_missing)
        expected = {}
        for name, tensor in model.state_dict().items():
            absent = name not in self.tensors
            if name in fused or (absent and (theirs.get(name, name) in tied or (optional and optional.search(name)))):
                continue
            spec = castable(name, TensorSpec.of(tensor), self.tensors)
            if name not in converted or self.tensors[name].spec != spec:
                expected[theirs.get(name, name)] = spec
        placed = [layer for path, layer in self.experts.items() if _module(model, path) is not None]
        dropped = check_names(model, self.folder, self.names, expected, {n for layer in placed for n in _names(layer)})
        sources = [name for conversion in self.names.conversions for name in conversion.sources]
        held = {theirs.get(name, name) for name in carried}
        loaded = [n for n in self.names.ours if n not in dropped and n not in held]
        return FolderReport(loaded, sources, sorted(held), dropped, tuple(unquantized))

    def _check_experts(self, model: nn.Module) -> set[str]:
        """Raise CheckpointError for experts that do not fit; the fused names of those which are not quantized."""
        for path, module in list(model.named_modules()):
            if isinstance(module, Experts):
                module.check_headers(self.experts[path])
        fused = set()
        for path in self.plain_experts(model):
            experts = model.get_submodule(path)
            fused |= {f"{path}.{name}" for name in (first_projection(experts), "down_proj")}
            _check_plain(experts, self.experts[path])
        return fused


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _names(layer: ExpertTensors) -> list[str]:
    return [entry.name for entry in layer.entries.values()]


def _patterns(patterns: Iterable[str] | None) -> re.Pattern[str] | None:
    return re.compile("|".join(f"({pattern})" for pattern in patterns)) if patterns else None


def _check_plain(experts: nn.Module, tensors: ExpertTensors) -> None:
    first = first_projection(experts)
    count, rows, hidden = experts.get_parameter(first).shape
    dtype = next(iter(tensors.entries.values())).dtype
    if first == "up_proj":
        shapes = {"w1": (rows, hidden), "w2": (hidden, rows)}
    else:
        shapes = {"w1": (rows // 2, hidden), "w3": (rows // 2, hidden), "w2": (hidden, rows // 2)}
    own = tensors if first != "up_proj" else tensors.without_gate()
    own.need(count, {(shard, "weight"): TensorSpec(shape, dtype) for shard, shape in shapes.items()})


def narrowed(conversions: Iterable[Any], plain: Iterable[str]) -> list[Any]:
    """transformers' conversions, those of fused experts for the layers at the paths ``plain`` alone."""
    kept: list[Any] = []
    for conversion in conversions:
        targets = getattr(conversion, "target_patterns", ())
        if not isinstance(conversion, WeightConverter) or not any("experts." in target for target in targets):
            kept.append(conversion)
            continue
        sources = [pattern.partition("experts")[2] for pattern in conversion.source_patterns]
        if not all("*" in pattern for pattern in sources):
            kept.append(conversion)  # fused in the files as well
            continue
        ends = [target.partition("experts")[2] for target in targets]
        kept += [
            WeightConverter([path + s for s in sources], [path + t for t in ends], operations=conversion.operations)
            for path in plain
        ]
    return kept
