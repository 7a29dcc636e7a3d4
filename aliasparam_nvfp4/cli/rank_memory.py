"""What a checkpoint takes on one rank, from its headers: layers declared on the meta device, nothing allocated."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from aliasparam import memory_report

from ..checkpoint import QuantConfig, TensorEntry, expert_layers
from ..errors import ShapeError
from ..linear import NvFp4LinearMethod
from ..moe import NvFp4MoEMethod

#: Projections whose input dim is divided among tensor-parallel ranks, as engines do; all others divide their rows.
ROW_PARALLEL = frozenset({"o_proj", "down_proj", "out_proj", "dense", "fc2", "w2", "wo", "c_proj"})
#: Siblings that engines fuse into one layer, by what files call them that store it fused.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class Part:
    """Bytes of one layer on one rank: in one copy, and with both formats kept apart."""

    what: str
    layer: int | None
    one_copy: int
    two_copies: int


class KVHeads(NamedTuple):
    """How many heads the keys have, and the values, and the rows of one."""

    heads: int
    rows: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> KVHeads | None:
        """What config.json says of the language model; None where it does not."""
        text = config.get("text_config")
        found = text if isinstance(text, Mapping) else config
        count, rows = found.get("num_key_value_heads"), found.get("head_dim")
        hidden, heads = found.get("hidden_size"), found.get("num_attention_heads")
        if rows is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
            rows = hidden // heads
        return cls(count, rows) if isinstance(count, int) and isinstance(rows, int) and count > 0 else None


def rank_memory(
    config: QuantConfig,
    tensors: Mapping[str, TensorEntry],
    *,
    tp: int,
    ep: int,
    backend: str,
    moe_backend: str,
    kv_heads: KVHeads | None = None,
) -> list[Part]:
    """What each layer takes on a rank. Tensors that are not quantized count whole: how they are divided is the engine's choice.

    Args:
        kv_heads: of which each rank has at least a whole one, so that several ranks have the same.

    Raises:
        ShapeError: dims that do not divide among the ranks, or that the backend does not take.
        BackendError: unknown names.
    """
    experts, left = _experts(config, tensors, tp, ep, moe_backend)
    linear, left = _linear(config, left, tp, backend, kv_heads)
    return [*linear, *experts, *(Part("not quantized", _layer(e.name), e.nbytes, e.nbytes) for e in left.values())]


def _experts(
    config: QuantConfig, tensors: Mapping[str, TensorEntry], tp: int, ep: int, runner: str
) -> tuple[list[Part], dict[str, TensorEntry]]:
    parts, used = [], set()
    for path, layer in expert_layers(tensors).items():
        rows = {shard: entry for (expert, shard, suffix), entry in layer.entries.items() if suffix == config.tensors.weight}
        if "w2" not in rows or rows["w2"].dtype is not torch.uint8:
            continue
        count = len({expert for expert, _, _ in layer.entries})
        hidden, inner = rows["w2"].shape[0], rows["w2"].shape[1] * 2
        gated = "w1" in rows and "w3" in rows
        with _of(path):
            size = _moe_bytes(runner, _divided(path, count, ep), hidden, _divided(path, inner, tp), gated)
        parts.append(Part("experts", _layer(path), *size))
        used |= {entry.name for entry in layer.entries.values()}
    return parts, {name: entry for name, entry in tensors.items() if name not in used}


def _linear(
    config: QuantConfig, tensors: Mapping[str, TensorEntry], tp: int, backend: str, kv_heads: KVHeads | None
) -> tuple[list[Part], dict[str, TensorEntry]]:
    names, left, parts = config.tensors, dict(tensors), []
    own = {names.weight, names.block_scale, names.weight_global, names.input_global}
    quantized = {
        name.rpartition(".")[0]: entry
        for name, entry in tensors.items()
        if name.endswith(f".{names.weight}") and entry.dtype is torch.uint8
    }
    for members in _groups(quantized):
        row_parallel = members[0].rpartition(".")[2] in ROW_PARALLEL
        shapes = [quantized[member].shape for member in members]
        k = shapes[0][1] * 2
        each = [part for m, (n, _) in zip(members, shapes, strict=True) for part in _projections(m, n, kv_heads)]
        rows = tuple(n if row_parallel else _rows(m, n, tp, kv_heads) for m, n in each)
        with _of(members[0]):
            size = _linear_bytes(backend, rows, _divided(members[0], k, tp) if row_parallel else k)
        parts.append(Part("linear layers", _layer(members[0]), *size))
        for member in members:
            for name in own:
                left.pop(f"{member}.{name}", None)
    return parts, left


def _groups(quantized: Mapping[str, TensorEntry]) -> Iterator[list[str]]:
    """Projections of one fused layer: siblings that read the same input."""
    left = dict.fromkeys(quantized)
    for name in quantized:
        if name not in left:
            continue
        parent = name.rpartition(".")[0]
        group = next((g for g in FUSED.values() if name.rpartition(".")[2] in g), ())
        members = [f"{parent}.{leaf}" if parent else leaf for leaf in group]
        if not all(m in left and quantized[m].shape[1] == quantized[name].shape[1] for m in members) or not members:
            members = [name]
        for member in members:
            del left[member]
        yield members


@contextmanager
def _of(name: str) -> Iterator[None]:
    """An error about a layer that was made for its size alone names the layer of the checkpoint."""
    try:
        yield
    except ShapeError as error:
        raise ShapeError(error.message, name=name, expected=error.expected, found=error.found, remedy=error.remedy) from error


def _projections(name: str, rows: int, kv_heads: KVHeads | None) -> list[tuple[str, int]]:
    """The projections that a tensor holds, each of which is divided for itself, with their rows."""
    parent, dot, leaf = name.rpartition(".")
    kv = kv_heads.heads * kv_heads.rows if kv_heads is not None else 0
    sizes = {"qkv_proj": (rows - 2 * kv, kv, kv), "gate_up_proj": (rows // 2, rows - rows // 2)}.get(leaf, ())
    if not sizes or min(sizes) <= 0:
        return [(name, rows)]
    return [(f"{parent}{dot}{member}", size) for member, size in zip(FUSED[leaf], sizes, strict=True)]


def _rows(name: str, rows: int, tp: int, kv_heads: KVHeads | None) -> int:
    """Of a projection that is divided by rows."""
    is_kv = name.rpartition(".")[2] in ("k_proj", "v_proj")
    if kv_heads is None or not is_kv or rows != kv_heads.heads * kv_heads.rows:
        return _divided(name, rows, tp)
    if kv_heads.heads % tp and tp % kv_heads.heads:
        raise ShapeError(
            "heads of keys and values do not divide among the ranks, nor ranks among them",
            name=name,
            expected=f"a divisor or a multiple of {tp}",
            found=kv_heads.heads,
        )
    return max(kv_heads.heads // tp, 1) * kv_heads.rows


def _divided(name: str, size: int, ranks: int) -> int:
    if size % ranks:
        raise ShapeError("a dim does not divide among the ranks", name=name, expected=f"a multiple of {ranks}", found=size)
    return size // ranks


def _layer(name: str) -> int | None:
    found = _LAYER.search(f"{name}.")
    return int(found[1]) if found else None


@cache
def _linear_bytes(backend: str, rows: tuple[int, ...], k: int) -> tuple[int, int]:
    layer, method = nn.Module(), NvFp4LinearMethod(backend)
    with torch.device("meta"):
        method.create_weights(layer, k, rows, k, sum(rows), torch.bfloat16)
    return _bytes(layer)


@cache
def _moe_bytes(runner: str, experts: int, hidden: int, inner: int, gated: bool) -> tuple[int, int]:
    from ..moe.activation import RELU2, SWIGLU

    layer, method = nn.Module(), NvFp4MoEMethod(runner, activation=SWIGLU if gated else RELU2)
    with torch.device("meta"):
        method.create_weights(layer, experts, hidden, inner, torch.bfloat16)
    return _bytes(layer)


def _bytes(layer: nn.Module) -> tuple[int, int]:
    report = memory_report(layer)
    return report.allocated_bytes, report.two_copies_bytes


def totals(parts: list[Part]) -> dict[str, tuple[int, int]]:
    """(one copy, two copies) by what it is, and the ``total``."""
    found: dict[str, tuple[int, int]] = {}
    for part in parts:
        for key in (part.what, "total"):
            one, two = found.get(key, (0, 0))
            found[key] = one + part.one_copy, two + part.two_copies
    return {**{key: value for key, value in found.items() if key != "total"}, "total": found.get("total", (0, 0))}
