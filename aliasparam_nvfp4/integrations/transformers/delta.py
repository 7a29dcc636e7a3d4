"""A delta between two checkpoint folders, applied to a transformers model that holds the first."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aliasparam import checkpoint_names
from aliasparam.host import HOST
from aliasparam.reload import prepare_delta
from aliasparam.reload.delta_apply import Check, opened_delta
from aliasparam.reload.delta_folder import Chain, DeltaFolder
from aliasparam.reload.delta_held import AddUp, Part, Places
from aliasparam.reload.live import Live
from aliasparam.reload.observe import Hooks
from aliasparam.reload.patch import Patch, patched
from aliasparam.reload.targets import find_targets, live_of

from ...checkpoint import WHOLE, CheckpointFolder, ExpertTensors
from ...moe.folder import expert_source
from ...quantize.block_scales import finite_after
from .conversions import Conversion
from .dropped import dropping_rule
from .experts import Experts
from .fp8 import Fp8Linear
from .reload import _agree, _names
from .ties import equal_in_deltas, tied_names
from .unwrap import plain_name, unwrapped


def apply_delta_folder(
    model: Any, delta: str | Path | DeltaFolder | Chain, *, serving: int | None = None, hooks: Hooks | None = None
) -> int:
    """:func:`aliasparam.apply_delta` by the names of the model's files; returns the version.

    Where processes share the experts all call this, and what one of them refuses all refuse; of experts that are split between
    them (tensor parallel) the deltas need adler32, which the processes add up.

    Args:
        model: loaded through this package's quantizer; compiled or wrapped, too.
        delta, serving, hooks: as there.

    Raises:
        AliasError: as there; the old weights serve.
    """
    model, told = unwrapped(model), _Told()
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(opened_delta(delta))
            places = places_of(model, opened, lambda rows: _add_up(model, told, rows))
            session = prepare_delta(model, opened, serving=serving, names=places, hooks=hooks, check=_need_scales(model))
        except Exception as error:
            if not told.refused:
                _agree(model, error)
            raise
        with session:
            _agree(model, None)
            session.commit()
        return opened.version


@dataclass
class _Told:
    """Whether every process knows already that one refuses."""

    refused: bool = False


def _add_up(model: nn.Module, told: _Told, rows: Tensor) -> None:
    """Over all processes, once all of them have read their deltas."""
    told.refused = True
    _agree(model, None)
    told.refused = False
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else HOST
    total = rows.to(device)
    dist.all_reduce(total)
    rows.copy_(total)


def places_of(model: nn.Module, delta: DeltaFolder | Chain, add_up: AddUp | None = None) -> Places:
    """Where this process has what the files of ``delta`` name."""
    targets = {id(target.tensor): place for place, target in find_targets(model).items()}
    live = {name: live_of(tensor) for name, tensor in checkpoint_names(model).items()}  # also behind twins of a failed reload
    names = {plain_name(name): targets[id(tensor)] for name, tensor in live.items() if id(tensor) in targets}
    converted = tuple(_Converted(model, one, names) for one in _names(model).conversions)
    parts: dict[str, Part] = {}
    divided: set[str] = set()
    tied = equal_in_deltas(tied_names(model, _names(model).ours), delta)
    elsewhere = {*tied} | set(_dropped(model, delta, {*names, *(name for one in converted for name in one.sources)}))
    for module in model.modules():
        if isinstance(module, Experts) and module.ranks.size > 1:
            split = {name: part for name, part in _of_experts(module) if name in module.names.values()}
            elsewhere |= set(module.names.values()) - names.keys()
            divided |= {name for name, part in split.items() if part is not None}
            parts |= {name: part for name, part in split.items() if part is not None and name in names}
    return Places(names, parts, divided, elsewhere, converted, add_up)


def _need_scales(model: nn.Module) -> Check:
    """Refuses what a delta would make of scales that are none, before it is written. Bytes that do not change are some."""
    finite = finite_after(model)
    fp8 = {
        id(live_of(module._parameters[leaf])): (path, module, leaf)  # type: ignore[arg-type]
        for path, module in model.named_modules()
        if isinstance(module, Fp8Linear)
        for leaf in module.scales
    }

    def check(label: str, live: Live, patches: Sequence[Patch]) -> None:
        finite(label, live, patches)
        if id(live.tensor) in fp8:
            path, module, leaf = fp8[id(live.tensor)]
            new = patched(live, patches).tensor
            module.check_scales(path, lambda name: new if name == leaf else live_of(module._parameters[name]))  # type: ignore[arg-type]

    return check


def _dropped(model: Any, delta: DeltaFolder | Chain, known: set[str]) -> Iterator[str]:
    """What the files have and the model has no place for, and needs none."""
    ours, folders = _names(model).ours, [delta] if isinstance(delta, DeltaFolder) else delta.deltas
    stored = [
        *(name for one in folders for name in one.checksums),
        *(delta.full.tensors if isinstance(delta, Chain) and delta.full else ()),
    ]
    rule = dropping_rule(model, {name: ours.get(name, name) for name in stored})
    yield from (name for name in stored if name not in known and rule(name, ours.get(name, name)) is not None)


def _of_experts(experts: Experts) -> Iterator[tuple[str, Part | None]]:
    """(name in the files, this process's part of it) of every expert's tensors, other processes' too; None: not divided."""
    tensors = ExpertTensors(experts.layer, {key: _Named(name) for key, name in experts.names.items()})  # type: ignore[misc]
    source = expert_source(experts.quant_method, experts, cast(CheckpointFolder, None), tensors)
    specs = source.specs()
    for (_, shard, suffix), name in experts.names.items():
        rows, columns = source.share(shard, suffix)
        if rows == WHOLE == columns:
            yield name, None
        else:
            shape = specs[shard, suffix].shape
            box = tuple((s.start or 0, n if s.stop is None else s.stop) for s, n in zip((rows, columns), shape, strict=True))
            yield name, Part(shape, box)


class _Named(NamedTuple):
    name: str


@dataclass(frozen=True)
class _Converted:
    """One of transformers' conversions, by the model's places."""

    model: Any
    conversion: Conversion
    places: Mapping[str, str]

    @property
    def sources(self) -> Collection[str]:
        return self.conversion.sources.keys()

    @property
    def targets(self) -> Collection[str]:
        return [self.places[name] for name in self.conversion.targets]

    def revert(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.conversion.revert(self.model, {name: tensors[self.places[name]] for name in self.conversion.targets})

    def convert(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {self.places[name]: value for name, value in self.conversion.convert(self.model, tensors).items()}
