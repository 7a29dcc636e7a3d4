"""Experts out of a checkpoint folder: each rank reads its own ranges of bytes and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aliasparam import Derivation, TensorSpec, reload
from aliasparam.host import HOST

from ..checkpoint import WHOLE, CheckpointError, CheckpointFolder, ExpertTensors, expert_layers
from ..checkpoint.experts import ExpertKey
from ..checkpoint.format import CheckpointFormat
from ..errors import ScaleError
from ..quantize.format import BLOCK_SIZE
from ..quantize.global_scale import need_stored_scales
from ..quantize.missing import Missing
from .declarations import Declared, try_out
from .method import NvFp4MoEMethod
from .ranks import ExpertRanks
from .runners import MoERunner, MoEShape

SHARDS = ("w1", "w3", "w2")


@dataclass(frozen=True)
class ExpertPart:
    """What one rank takes of one tensor."""

    key: ExpertKey
    name: str
    rows: slice
    columns: slice


@dataclass(frozen=True)
class ExpertSource:
    """One layer's experts in a folder, as one rank needs them.

    Attributes:
        folder: opened.
        tensors: the layer's, from :func:`~aliasparam_nvfp4.checkpoint.expert_layers`.
        shape: of the layer on this rank.
        ranks: which of them this one is.
        format: how the tensors are called.
        input_scale: whether experts have activation scales.
        separate_scales: whether the runner takes gate and up with different global scales.
        missing: what counts for experts without an input scale, see missing.py.
        derivations: what the runner computes from scales.
    """

    folder: CheckpointFolder
    tensors: ExpertTensors
    shape: MoEShape
    ranks: ExpertRanks
    format: CheckpointFormat
    input_scale: bool
    separate_scales: bool
    missing: Missing = "refuse"
    derivations: Sequence[Derivation] = ()

    @property
    def gated(self) -> bool:
        return self.shape.expert_activation.gated

    @property
    def optional(self) -> frozenset[str]:
        """Suffixes which experts may have in the files or not: input scales where they are not read, or may be missing."""
        return optional_suffixes(self.format, self.missing, input_scale=self.input_scale)

    def specs(self) -> dict[tuple[str, str], TensorSpec]:
        """(shard, suffix) to what the folder must hold for every expert, undivided."""
        intermediate = self.shape.intermediate * self.ranks.tp_size
        return expert_specs(self.format, self.shape.hidden, intermediate, input_scale=self.input_scale, gated=self.gated)

    def parts(self) -> Iterator[ExpertPart]:
        """What this rank reads: its experts, its share of each, and the input scales of all experts."""
        for key in self._keys():
            if key in self.tensors.entries or key[2] not in self.optional:
                yield ExpertPart(key, self.tensors.name(key), *self.share(key[1], key[2]))

    def absent(self) -> Iterator[ExpertKey]:
        """Input scales that the layer has and the files do not."""
        yield from (key for key in self._keys() if key[2] == self.format.input_global and key not in self.tensors.entries)

    def _keys(self) -> Iterator[ExpertKey]:
        first, shape = self.shape.first_expert, self.shape
        for shard, suffix in self.specs():
            everyone = suffix == self.format.input_global
            for expert in range(shape.all_experts) if everyone else range(first, first + shape.experts):
                yield expert, shard, suffix

    def share(self, shard: str, suffix: str) -> tuple[slice, slice]:
        """Rows and columns of each expert's tensor that this rank has."""
        elements = {self.format.weight: 2, self.format.block_scale: BLOCK_SIZE}.get(suffix)
        if elements is None or self.ranks.tp_size == 1:
            return WHOLE, WHOLE
        width = self.shape.intermediate // (elements if shard == "w2" else 1)
        own = slice(self.ranks.tp_rank * width, (self.ranks.tp_rank + 1) * width)
        return (WHOLE, own) if shard == "w2" else (own, WHOLE)

    def check(self) -> None:
        """Everything that headers and scalars can tell.

        Raises:
            CheckpointError: experts missing, twice or too many, or tensors that do not fit.
            ScaleError: global scales which are none, or of gate and up which this runner cannot take.
        """
        self.tensors.need(self.shape.all_experts, self.specs(), optional=self.optional)
        scalars = {p.key: float(self.folder.read(p.name)) for p in self.parts() if self._is_scalar(p.key)}
        need_stored_scales({self.tensors.name(key): v for key, v in scalars.items() if key[2] not in self.optional})
        weight = self.format.weight_global
        differing = {
            self.tensors.name(key): (value, scalars[key[0], "w3", weight])
            for key, value in scalars.items()
            if self.gated and key[1:] == ("w1", weight) and value != scalars[key[0], "w3", weight]
        }
        if differing and not self.separate_scales:
            raise ScaleError(
                "gate and up of an expert have different weight global scales, and this runner has one factor",
                expected="equal values",
                found=differing,
                remedy="Use a runner which takes them apart (reference, flashinfer_trtllm_routed), or unify the scales.",
            )
        self._derive(scalars)

    def _derive(self, scalars: Mapping[ExpertKey, float]) -> None:
        """Compute what will be computed after loading: it refuses what float32 does not hold."""
        rows: dict[str, list[list[float]]] = {}
        for key in self._rows():
            if self._is_scalar(key):
                rows.setdefault(_name(key), []).append([scalars.get(half, 0.0) for half in self._halves(key)])
        flat = {f"w2_{self.format.weight_global}", f"w2_{self.format.input_global}"}
        flat |= set() if self.gated else {f"w13_{self.format.weight_global}"}
        values = {name: torch.tensor(row, device=HOST) for name, row in rows.items()}
        values |= {name: values[name].flatten() for name in flat & values.keys()}
        try_out(self.derivations, values)

    def _is_scalar(self, key: ExpertKey) -> bool:
        return key[2] in (self.format.weight_global, self.format.input_global)

    def rows(self) -> Iterator[tuple[str, int, Tensor]]:
        """(name on the layer, row, value of that row ``[1, ...]``): gate above up, read one expert at a time."""
        parts = {part.key: part for part in self.parts()}
        for key in self._rows():
            expert, shard, suffix = key
            values = [self._value(parts.get(half)) for half in self._halves(key)]
            row = expert if suffix == self.format.input_global else expert - self.shape.first_expert
            value = torch.cat(values)
            flat = shard == "w2" or (not self.gated and suffix == self.format.weight_global)
            yield _name(key), row, value if flat and value.dim() == 1 else value.unsqueeze(0)

    def _halves(self, key: ExpertKey) -> list[ExpertKey]:
        return [key, (key[0], "w3", key[2])] if key[1] == "w1" and self.gated else [key]

    def _rows(self) -> Iterator[ExpertKey]:
        yield from (key for key in self._keys() if key[1] != "w3")

    def _value(self, part: ExpertPart | None) -> Tensor:
        """As the files have it; 0 is an input scale that is missing."""
        if part is None:
            return torch.zeros(1, device=HOST)
        value = self.folder.read(part.name, part.rows, part.columns)
        return value.reshape(1) if self._is_scalar(part.key) else value


def _name(key: ExpertKey) -> str:
    """On the layer."""
    return f"{'w2' if key[1] == 'w2' else 'w13'}_{key[2]}"


def expert_specs(
    names: CheckpointFormat, hidden: int, intermediate: int, *, input_scale: bool, gated: bool = True
) -> dict[tuple[str, str], TensorSpec]:
    """(shard, suffix) to the tensor that every expert has in the files."""
    found = {}
    scalars = (names.weight_global, names.input_global) if input_scale else (names.weight_global,)
    for shard in SHARDS if gated else ("w1", "w2"):
        n, k = (hidden, intermediate) if shard == "w2" else (intermediate, hidden)
        found[shard, names.weight] = TensorSpec((n, k // 2), torch.uint8)
        found[shard, names.block_scale] = TensorSpec((n, k // BLOCK_SIZE), torch.float8_e4m3fn)
        for name in scalars:
            found[shard, name] = TensorSpec(names.scalar_shape, torch.float32)
    return found


def optional_suffixes(names: CheckpointFormat, missing: Missing, *, input_scale: bool) -> frozenset[str]:
    """See :attr:`ExpertSource.optional`."""
    return frozenset() if input_scale and missing == "refuse" else frozenset({names.input_global})


def expert_source(method: NvFp4MoEMethod, layer: nn.Module, folder: CheckpointFolder, tensors: ExpertTensors) -> ExpertSource:
    """``tensors`` of ``folder``, for a layer made by ``method``."""
    declared: Declared = layer.__dict__["nvfp4_moe_declared"]
    runner: MoERunner = layer.__dict__["nvfp4_runner"]  # which may have been retargeted
    own = tensors if method.activation.gated else tensors.without_gate()
    return ExpertSource(
        folder,
        own,
        declared.shape,
        method.ranks,
        declared.names,
        declared.input_scale,
        runner.separate_scales,
        declared.missing,
        declared.derivations(runner),
    )


def load_experts(
    method: NvFp4MoEMethod,
    layer: nn.Module,
    folder: CheckpointFolder,
    name: str,
    *,
    on_bytes: Callable[[int], None] = lambda n: None,
) -> int:
    """Load or hot-reload this rank's part of one layer's experts, in place; returns the bytes that were loaded.

    All that headers and scalars can tell is checked before the first write. Only this rank's rows of w1 and w3 and columns of
    w2 are read, only of its experts; input scales are read of all.

    Args:
        method: whose ``create_weights`` made ``layer``.
        layer: holds nothing yet, or an older checkpoint.
        folder: an opened checkpoint.
        name: of the experts there: ``model.layers.0.mlp.experts``.
        on_bytes: called with the bytes of every piece.

    Raises:
        CheckpointError: no experts of that name, or see :meth:`ExpertSource.check`. The layer is as it was.
        ScaleError: see :meth:`ExpertSource.check`. The layer is as it was.
    """
    layers = expert_layers(folder.tensors)
    if name not in layers:
        raise CheckpointError(
            "the checkpoint has no experts of this name", name=f"{folder.path}: {name}", found=", ".join(layers) or "no experts"
        )
    source = expert_source(method, layer, folder, layers[name])
    source.check()
    return load_from(source, layer, on_bytes)


def load_from(source: ExpertSource, layer: nn.Module, on_bytes: Callable[[int], None] = lambda n: None) -> int:
    """The same from a source that was checked already."""
    total = 0
    with torch.no_grad(), reload(layer) as session:
        for target, row, value in source.rows():
            session.update(target, value, first_row=row)
            total += value.nbytes
            on_bytes(value.nbytes)
    return total
