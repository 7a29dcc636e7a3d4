"""Weights of 16 or 32 bits on their way into a model that serves NVFP4: each becomes what a checkpoint holds of it.

[Note: one global scale] Projections that one kernel is called for (q, k, v; gate, up; those of one expert) have one alpha. So
they get one global scale, that of the largest of their values, as ModelOpt's exporter unifies it
(``preprocess_linear_fusion``); each waits for the others. Which these are is seen by where they lie: in one storage, and in
one region of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from aliasparam.errors import ReloadError, located
from aliasparam.host import HOST
from aliasparam.layout.boxes import Box, part_in, shown, sizes, tiles, whole
from aliasparam.spec import TensorSpec, is_wide, no_values
from aliasparam.storage.coverage import Coverage
from aliasparam.tensors.faces import _Aliased
from aliasparam.tensors.geometry import place_of

from .checkpoint.format import COMPRESSED_TENSORS, KV_SCALES, MODELOPT, CheckpointFormat
from .errors import ScaleError
from .quantize.codec import quantize
from .quantize.format import E2M1_MAX, E4M3_MAX

#: "max": the global scale is that of the largest value, ``amax / (6 * 448)``, as ModelOpt's. "kept": it is the one that serves:
#: weights need not wait for one another, and few bytes change where few values do; larger values than it can say are refused.
Recipe = Literal["max", "kept"]
#: (name, tensor), or (name, a rectangle of a tensor, where it is).
Item: TypeAlias = "tuple[str, Tensor] | tuple[str, Tensor, Box | None]"

#: Values that are quantized at once: scratch is some 50 bytes for each.
_PIECE = 1 << 21


def quantize_on_arrival(
    tensors: Mapping[str, Tensor] | Iterable[Item], served: Mapping[str, Tensor], recipe: Recipe = "max"
) -> Iterator[tuple[str, Tensor, Box | None]]:
    """What a session loads, from the tensors of a trainer: ``r.load(quantize_on_arrival(tensors, r.tensors))``.

    A weight ``[N, K]`` that the model has in NVFP4 becomes codes, block scales and a global scale, with the bytes of ModelOpt's
    exporter (:func:`~aliasparam_nvfp4.quantize.codec.quantize`). Scales of activations cannot be computed from weights and stay
    as they are. A tensor that the model has unquantized is cast to its dtype; all others, quantized ones too, pass unchanged.

    Memory: weights that wait for those they share a scale with, and on the model's device some 100 MiB of scratch.

    Args:
        tensors: under the names of the checkpoint, on any device; of a stream, in parts.
        served: of the session, whose names and scales these are.
        recipe: how global scales are chosen: "max", of the largest value, or "kept", the one that serves.

    Raises:
        ReloadError: a weight of another shape, one without those it shares a scale with, or one that came twice; a layer whose
            input features have factors (AWQ); an unknown recipe.
        ScaleError: values that are not finite, or larger than a scale that is kept can say.
    """
    if recipe not in get_args(Recipe):
        raise ReloadError("unknown recipe", expected=" or ".join(get_args(Recipe)), found=repr(recipe)[:80])
    weights = {weight.name: weight for weight in _weights(served, apart=recipe == "kept")}
    members = Counter(weight.shares for weight in weights.values())
    waiting: dict[object, dict[str, _Arriving]] = {}
    sent = set[str]()
    for name, value, *rest in tensors.items() if isinstance(tensors, Mapping) else tensors:
        box, weight = rest[0] if rest else None, weights.get(name)
        sent.add(name)
        if weight is None or not _is_wide(value):
            yield name, _cast(value, served.get(name)), box
            continue
        group = waiting.setdefault(weight.shares, {})
        if name not in group:  # in memory of its own: a stream uses its buffer again
            group[name] = _Arriving(weight, value.new_empty(weight.shape))
        group[name].take(value, box)
        if len(group) == members[weight.shares] and all(one.is_whole for one in group.values()):
            yield from _encoded(list(waiting.pop(weight.shares).values()), served, recipe)
    for group in waiting.values():
        raise _incomplete(group, weights.values())
    for name in _of_activations(served, sent, weights.values()):
        if name not in sent:
            yield name, served[name].detach().clone(), None


@dataclass(frozen=True)
class _Weight:
    """One that the model has in NVFP4.

    Attributes:
        name: of its values in a checkpoint that is not quantized.
        codes: of its packed values.
        prefix, names: of its scales.
        shape: of its values.
        shares: equal for weights that have one global scale.
        has_factors: whether its input features have.
        columns: the files have it ``[E, K, N]`` (gpt-oss's experts).
    """

    name: str
    codes: str
    prefix: str
    names: CheckpointFormat
    shape: tuple[int, ...]
    shares: object
    has_factors: bool = False
    columns: bool = False

    @property
    def input_global(self) -> str:
        return f"{self.prefix}{self.names.input_global}"


def _weights(served: Mapping[str, Tensor], *, apart: bool) -> Iterator[_Weight]:
    for name, tensor in served.items():
        path, dot, leaf = name.rpartition(".")
        prefix = path + dot
        for names in (MODELOPT, COMPRESSED_TENSORS):
            beside = {prefix + names.block_scale, prefix + names.weight_global}
            if leaf == names.weight and tensor.dtype is torch.uint8 and beside <= served.keys():
                shape = (*tensor.shape[:-1], tensor.shape[-1] * 2)
                shares, factors = name if apart else _region(tensor), f"{prefix}pre_quant_scale" in served
                yield _Weight(f"{prefix}weight", name, prefix, names, shape, shares, factors)
        if (
            tensor.dtype is torch.uint8
            and tensor.dim() == 3
            and {f"{name}_weight_scale", f"{name}_weight_scale_2"} <= served.keys()
        ):
            e, k, n = tensor.shape
            yield _Weight(name, name, f"{name}_", MODELOPT, (e, k * 2, n), name, columns=True)


def _of_activations(served: Iterable[str], sent: set[str], weights: Iterable[_Weight]) -> Iterator[str]:
    """Scales of what reads, or is made by, weights that were sent: of a KV cache they are the projection's or its block's."""
    inputs = {weight.input_global for weight in weights if weight.name in sent}
    modules = {name.rpartition(".")[0] for name in sent}
    owners = modules | {path.rpartition(".")[0] for path in modules}
    for name in served:
        path, _, leaf = name.rpartition(".")
        if name in inputs or (leaf in KV_SCALES and path.removesuffix(".attn") in owners):
            yield name


def _region(tensor: Tensor) -> object:
    """What a tensor lies in: a storage, and the region of it."""
    if not isinstance(tensor, _Aliased):
        return id(tensor)
    storage = tensor._alias_storage
    place = place_of(storage, tensor._alias_geometry)
    return id(storage), None if place is None else place.box[: storage.bound.lead]


@dataclass
class _Arriving:
    """The values of one weight, as far as they have come."""

    weight: _Weight
    values: Tensor
    covered: Coverage = field(init=False)

    def __post_init__(self) -> None:
        self.covered = Coverage(self.weight.shape)
        if self.weight.has_factors:
            raise ReloadError(
                "input features of this layer have factors (AWQ), which belong to the quantized weights they came with",
                name=self.weight.name,
                expected="quantized tensors",
                found="values",
                remedy="Quantize it as the checkpoint was, and send that.",
            )

    @property
    def is_whole(self) -> bool:
        return self.covered.whole

    def take(self, value: Tensor, box: Box | None) -> None:
        name, shape = self.weight.name, self.weight.shape
        place = whole(shape) if box is None else box
        with located(name=name):
            is_new = self.covered.add(place)
        expected, found = TensorSpec(sizes(place), self.values.dtype), TensorSpec.of(value)
        if found != expected:
            raise ReloadError("this weight does not fit", name=name, expected=expected, found=found)
        if not is_new:
            raise ReloadError("elements of this weight arrived twice", name=name, expected="each once", found=shown(place))
        self.values[part_in(place, whole(shape))] = value.detach()


def _encoded(group: list[_Arriving], served: Mapping[str, Tensor], recipe: Recipe) -> Iterator[tuple[str, Tensor, Box | None]]:
    """Everything that a checkpoint has of weights that share a global scale, in pieces of whole rows."""
    largest = torch.stack([_largest(one) for one in group]).amax(0)
    for one in group:
        weight = one.weight
        live = served[weight.prefix + weight.names.weight_global]
        each = weight.columns and live.numel() > 1  # every expert has one
        stored, scale = _global_scale(weight, largest if each else largest.amax(), live, recipe)
        values = one.values.mT if weight.columns else one.values
        for box in tiles(lines := whole(values.shape[:-1]), max(_PIECE // values.shape[-1], 1)):
            own = scale[slice(*box[0])].view(-1, 1, 1) if each else scale
            packed, block_scale, _ = quantize(values[part_in(box, lines)].to(live.device), own)
            for name, part in ((weight.codes, packed), (weight.prefix + weight.names.block_scale, block_scale)):
                place = (*box, (0, part.shape[-1]))
                if weight.columns:
                    part, place = part.mT, (*place[:-2], place[-1], place[-2])
                yield name, part, place
        yield weight.prefix + weight.names.weight_global, stored, None


def _largest(one: _Arriving) -> Tensor:
    """Of its values, f64 ``[1]``, or ``[E]`` of experts in one tensor. Raises ScaleError where one is not finite."""
    values = one.values if one.weight.columns else one.values.unsqueeze(0)
    largest = values.abs().flatten(1).amax(1).to(HOST).double()
    if not bool(largest.isfinite().all()):
        raise ScaleError("this weight has values that are not finite", name=one.weight.name, found=float(largest.amax()))
    return largest


def _global_scale(weight: _Weight, largest: Tensor, live: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """As the checkpoint stores it; and as a multiplier, f32 of the shape of ``largest``: ``[]``, or ``[E]``."""
    largest = largest.to(live.device)
    if recipe == "kept":
        stored = live.detach().clone()
        if not largest.dim() and bool((stored != stored.reshape(-1)[0]).any()):
            raise ScaleError("partitions that arrive in one weight have other scales", name=weight.name, found=stored.tolist())
    else:
        scale = largest.float() / (E2M1_MAX * E4M3_MAX)
        scale = torch.where(scale > 0, scale, 1.0)  # zeros have zero codes at any scale
        stored = (1.0 / scale if weight.names.reciprocal else scale).expand(live.shape)
    one = stored.reshape(-1) if largest.dim() else stored.reshape(-1)[0]
    multiplier = 1.0 / one if weight.names.reciprocal else one
    limit = multiplier.double() * E2M1_MAX * E4M3_MAX
    if bool((largest > limit * (1 + 2**-20)).any()):
        raise ScaleError(
            "the global scale that is kept cannot say the largest value of this weight",
            name=weight.name,
            expected=f"at most {limit.tolist()}",
            found=largest.tolist(),
            remedy='Give it a scale of its own: recipe="max".',
        )
    return stored, multiplier


def _cast(value: Tensor, served: Tensor | None) -> Tensor:
    return value.to(served.dtype) if served is not None and _is_wide(value) and is_wide(served.dtype) else value


def _is_wide(value: object) -> bool:
    """False also of what is no tensor with values: that the session refuses."""
    return isinstance(value, Tensor) and no_values(value) is None and is_wide(value.dtype)


def _incomplete(group: Mapping[str, _Arriving], weights: Iterable[_Weight]) -> ReloadError:
    name, first = next(iter(group.items()))
    missing = [one.name for one in weights if one.shares == first.weight.shares and one.name not in group]
    parts = [one for one, arriving in group.items() if not arriving.is_whole]
    return ReloadError(
        "a weight arrived without all that it shares a global scale with",
        name=name,
        expected="the whole of each",
        found=f"nothing of {', '.join(missing[:5])}" if missing else f"a part of {', '.join(parts[:5])}",
        remedy='Send them in one reload, or keep the scale: recipe="kept".',
    )
