"""compressed-tensors' config: groups of targets, each with a scheme, and modules to ignore.

A target or an entry of ``ignore`` is the exact name of a module, a regular expression after ``re:``, or the name of a module's
class; of a module's targets a name counts before an expression, and either before the class. Where two expressions match, the
file's weight says which is meant; otherwise the first in alphabetical order. A target of two groups is the last one's
(``compressed_tensors/utils/match.py``, ``match_targets``; ``quantization/lifecycle/apply.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..quantize.format import BLOCK_SIZE
from ._entries import kv_cache_algo, mapping, mappings, patterns
from ._modelopt import unsupported
from .errors import UnsupportedFormatError
from .format import COMPRESSED_TENSORS
from .patterns import Patterns
from .rules import Quantization, Rules
from .scheme import FP8_BLOCK, NVFP4, W4A16, Inputs, Scheme

METHOD = "compressed-tensors"
#: What a linear module's class may be called.
_CLASSES = ("Linear", "LinearBase")
_INPUTS: dict[tuple[str, bool], Inputs] = {
    ("tensor", False): "stored", ("tensor", True): "tensor", ("token", True): "token", ("group", True): "block",
}  # fmt: skip


def wrote(config: Mapping[str, Any]) -> bool:
    """Whether this config is of compressed-tensors."""
    return str(config.get("quant_method")).lower().replace("_", "-") == METHOD


def read(config: Mapping[str, Any], where: str) -> Quantization:
    """Raises CheckpointError and UnsupportedFormatError, see :meth:`QuantConfig.from_dict`."""
    groups = mappings(config, "config_groups", where)
    odd = [key for key in ("sparsity_config", "transform_config") if any(_really(config, key, where).values())]
    if not groups or odd:
        raise unsupported(where, f"format {config.get('format')!r}, {', '.join(odd) or 'no config groups'}")
    named: dict[str, Scheme] = {}
    classes: list[Scheme] = []
    for name, group in groups.items():
        scheme = _scheme(group, f"{where}: {name}")
        for target in patterns(group, "targets", f"{where}: {name}"):
            if target in _CLASSES:
                classes.insert(0, scheme)
            else:
                named[target] = scheme
    schemes = {*named.values(), *classes}
    if not any(scheme.is_fp4 for scheme in schemes):
        raise unsupported(where, f"format {config.get('format')!r}, no group of NVFP4")
    exclude = tuple(dict.fromkeys(n for key in ("ignore", "modules_to_not_convert") for n in patterns(config, key, where)))
    ignored = (*exclude, "re:") if any(name in exclude for name in _CLASSES) else exclude  # a class: every linear module
    targets = sorted(named)
    each = tuple((named[target],) for target in targets)
    rules = Rules(Patterns(targets, exact=True), each, tuple(dict.fromkeys(classes)), Patterns(ignored, exact=True))
    algo = "MIXED_PRECISION" if len(schemes) > 1 else next(iter(schemes)).algo
    return Quantization(algo, BLOCK_SIZE, exclude, COMPRESSED_TENSORS, rules, kv_cache_algo(config, where), dict(config))


def _really(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """An entry that says something: exporters write the names of nothing, too."""
    found = mapping(config, key, where)
    return {} if found.get("format") == "dense" else {k: v for k, v in found.items() if k not in ("registry_requires_subclass",)}


def _scheme(group: Mapping[str, Any], where: str) -> Scheme:
    weights, inputs = mapping(group, "weights", where), mapping(group, "input_activations", where)
    bits, kind, strategy = (weights.get(key) for key in ("num_bits", "type", "strategy"))
    packing = group.get("format")
    if kind != "float" or weights.get("symmetric") is False or weights.get("actorder"):
        raise unsupported(where, f"weights {dict(weights)}")
    if bits == 4 and strategy == "tensor_group" and packing in (None, "nvfp4-pack-quantized"):
        if (size := weights.get("group_size")) != BLOCK_SIZE:
            raise UnsupportedFormatError("NVFP4 has one block scale per 16 values", name=where, expected=BLOCK_SIZE, found=size)
        if inputs and _kind(inputs) != (4, "float", BLOCK_SIZE):
            raise unsupported(where, f"NVFP4 weights with activations {dict(inputs)}")
        return NVFP4 if inputs else W4A16
    if bits == 8 and strategy in ("tensor", "channel", "block") and packing in (None, "float-quantized", "naive-quantized"):
        block = _block(weights, where) if strategy == "block" else None
        if not inputs:
            return Scheme("FP8", None, block)
        how = _INPUTS.get((str(inputs.get("strategy", "tensor")), inputs.get("dynamic") is True))
        if how is None or _kind(inputs, FP8_BLOCK) != (8, "float", FP8_BLOCK):
            raise unsupported(where, f"activations {dict(inputs)}")
        return Scheme("FP8", how, block)
    raise unsupported(where, f"format {group.get('format')!r}, {bits}-bit weights by {strategy}")


def _kind(inputs: Mapping[str, Any], group: int = BLOCK_SIZE) -> tuple[Any, Any, Any]:
    """Bits, type and group size of activations; ``group`` where they are not in groups, or of no other size than is usual."""
    grouped = inputs.get("strategy") in ("group", "tensor_group") and inputs.get("group_size") is not None
    return inputs.get("num_bits"), inputs.get("type"), inputs["group_size"] if grouped else group


def _block(weights: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    """(rows, columns) of one scale of FP8 weights, where the config says."""
    found = weights.get("block_structure")
    if found is None:
        return None
    if not isinstance(found, (list, tuple)) or len(found) != 2 or not all(type(n) is int and n > 0 for n in found):
        raise unsupported(where, f"blocks {found!r}")
    return found[0], found[1]
