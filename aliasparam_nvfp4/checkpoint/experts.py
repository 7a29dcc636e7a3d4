"""The experts of one layer in a checkpoint: one tensor for each expert, projection and suffix, in either spelling.

Mixtral's files say ``experts.E.w1 / w3 / w2``; all other models, and Mixtral written by llm-compressor, say
``experts.E.gate_proj / up_proj / down_proj``. Both mean the same shards.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from aliasparam import TensorSpec

from .errors import CheckpointError
from .folder import TensorEntry
from .validate import fits

#: How files call a projection, and the shard id that loaders call it by.
SHARD_OF = {"w1": "w1", "w3": "w3", "w2": "w2", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_NAME = re.compile(rf"(?P<layer>(?:.+\.)?experts)\.(?P<expert>\d+)\.(?P<projection>{'|'.join(SHARD_OF)})\.(?P<suffix>\w+)")
_SHOWN = 5


@dataclass(frozen=True)
class ExpertTensorName:
    """``{layer}.{expert}.{projection}.{suffix}``, taken apart.

    Attributes:
        layer: ``model.layers.0.mlp.experts``.
        expert: its number.
        projection: as the file spells it.
        suffix: ``weight``, ``weight_scale``, ...
    """

    layer: str
    expert: int
    projection: str
    suffix: str

    @property
    def shard(self) -> str:
        """The loaders' id: w1 (gate), w3 (up) or w2 (down)."""
        return SHARD_OF[self.projection]

    @property
    def key(self) -> ExpertKey:
        return self.expert, self.shard, self.suffix

    @classmethod
    def parse(cls, name: str) -> ExpertTensorName | None:
        """None for a tensor which is not of an expert."""
        found = _NAME.fullmatch(name)
        return cls(found["layer"], int(found["expert"]), found["projection"], found["suffix"]) if found else None


#: (expert, shard, suffix).
ExpertKey = tuple[int, str, str]


@dataclass(frozen=True)
class ExpertTensors:
    """All experts of one layer, as headers describe them.

    Attributes:
        layer: the name in front of the experts' numbers.
        entries: by (expert, shard, suffix).
    """

    layer: str
    entries: Mapping[ExpertKey, TensorEntry]

    def name(self, key: ExpertKey) -> str:
        """The tensor's name in the files."""
        return self.entries[key].name

    def projections(self) -> Iterator[str]:
        """The dotted name of every projection of every expert."""
        yield from dict.fromkeys(entry.name.rpartition(".")[0] for entry in self.entries.values())

    def without_gate(self) -> ExpertTensors:
        """The same for experts that have no gate: their one projection before w2, which files call up_proj, is w1."""
        keys = {key: (key[0], "w1", key[2]) if key[1] == "w3" else key for key in self.entries}
        if len(set(keys.values())) < len(keys):
            return self
        return ExpertTensors(self.layer, {keys[key]: entry for key, entry in self.entries.items()})

    def need(self, experts: int, expected: Mapping[tuple[str, str], TensorSpec], *, optional: Collection[str] = ()) -> None:
        """Hold the layer against what a model needs, from headers alone.

        Args:
            experts: how many the model has.
            expected: for each (shard, suffix) the tensor that every expert has.
            optional: suffixes of which experts may have tensors or not.

        Raises:
            CheckpointError: lists experts that are missing or too many, tensors that an expert lacks or has too many, dtypes
                that differ among experts, and shapes that do not fit.
        """
        found = {expert for expert, _, _ in self.entries}
        wrong = [f"expert {e} is missing" for e in range(experts) if e not in found]
        wrong += [f"expert {e} is unexpected: the model has {experts}" for e in sorted(found) if e >= experts]
        for expert in sorted(found & set(range(experts))):
            have = {(shard, suffix) for e, shard, suffix in self.entries if e == expert}
            wrong += [f"expert {expert} lacks {shard} {suffix}" for shard, suffix in expected
                      if (shard, suffix) not in have and suffix not in optional]  # fmt: skip
            extra = sorted(key for key in have - expected.keys() if key[1] not in optional)
            wrong += [f"unexpected: {self.name((expert, *key))}" for key in extra]
        for (shard, suffix), spec in expected.items():
            group = {e: self.entries[e, shard, suffix] for e in sorted(found) if (e, shard, suffix) in self.entries}
            dtypes = {entry.dtype for entry in group.values()}
            if len(dtypes) > 1:
                each = ", ".join(f"expert {e} {str(entry.dtype).removeprefix('torch.')}" for e, entry in group.items())
                wrong.append(f"experts with different dtypes of {shard} {suffix}: {each}")
                continue
            wrong += [f"{e.name}: expected {spec}, found {e.spec}" for e in group.values() if not fits(e.spec, spec)]
        if wrong:
            more = [f"… and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
            raise CheckpointError(
                "the experts in the checkpoint do not fit the model; nothing was loaded",
                name=self.layer,
                expected=f"{experts} experts of {len(expected)} tensors each",
                found="\n            ".join([*wrong[:_SHOWN], *more]),
                remedy="Export the checkpoint again from the same architecture, or load the right folder.",
            )


def expert_layers(tensors: Mapping[str, TensorEntry]) -> dict[str, ExpertTensors]:
    """The layers which have experts, by the name in front of the experts' numbers.

    Raises:
        CheckpointError: one tensor of one expert is there in both spellings.
    """
    layers: dict[str, dict[ExpertKey, TensorEntry]] = {}
    for entry in tensors.values():
        name = ExpertTensorName.parse(entry.name)
        if name is None:
            continue
        entries = layers.setdefault(name.layer, {})
        if name.key in entries:
            raise CheckpointError(
                "one tensor of an expert is in the checkpoint twice",
                name=name.layer,
                expected=f"expert {name.expert} {name.shard} {name.suffix} once",
                found=f"{entries[name.key].name} and {entry.name}",
            )
        entries[name.key] = entry
    return {layer: ExpertTensors(layer, entries) for layer, entries in layers.items()}
