"""ModelOpt's spellings: ``quantization_config`` in config.json (flat), hf_quant_config.json (nested under ``quantization``), and
what engines rename them to (``modelopt_fp4``, ``modelopt_mixed``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..quantize.format import BLOCK_SIZE
from ._entries import kv_cache_algo, mapping, mappings, patterns, text, whole_number
from .errors import UnsupportedFormatError
from .format import MODELOPT
from .patterns import Patterns
from .rules import Quantization, Rules
from .scheme import BY_ALGO, W4A16, Scheme

#: Algorithms of whole checkpoints that are read.
SUPPORTED = ("NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", "MIXED_PRECISION")
METHODS = ("modelopt", "modelopt_fp4", "modelopt_mixed")
_IGNORE = ("ignore", "modules_to_not_convert", "exclude_modules")


def wrote(config: Mapping[str, Any]) -> bool:
    """Whether ModelOpt wrote this config, or may have."""
    return str(config.get("quant_method", METHODS[0])).lower() in METHODS


def read(config: Mapping[str, Any], where: str) -> Quantization:
    """Raises CheckpointError and UnsupportedFormatError, see :meth:`QuantConfig.from_dict`."""
    body = {**config, **mapping(config, "quantization", where)}
    layers = mappings(body, "quantized_layers", where)
    groups = mappings(body, "config_groups", where)
    algo = (text(body, "quant_algo", where) or ("MIXED_PRECISION" if layers else "")).upper()
    if not wrote(config) or algo not in SUPPORTED:
        raise unsupported(where, f"quant_method {config.get('quant_method')!r}, quant_algo {body.get('quant_algo')!r}")
    weights = {name: mapping(group, "weights", f"{where}: {name}") for name, group in groups.items()}
    acts = {name: mapping(group, "input_activations", f"{where}: {name}") for name, group in groups.items()}
    _need_blocks_of_16(body, algo, [w for w in weights.values() if w.get("num_bits", 4) == 4], layers, where)
    left = [name for name, layer in layers.items() if layer.get("quant_algo") is None]
    exclude = tuple(dict.fromkeys([*left, *(name for key in _IGNORE for name in patterns(body, key, where))]))
    # Exporters label weights alone NVFP4 too. Where no group has activations, the files' scales tell.
    alone = bool(groups) and not any(acts[name] for name, w in weights.items() if w.get("num_bits", 4) == 4)
    if algo == "MIXED_PRECISION":
        quantized = {name: layer for name, layer in layers.items() if layer.get("quant_algo") is not None}
        named = _by_layer(quantized, where) if layers else _by_group(groups, weights, acts, where)
        schemes = tuple(_perhaps_alone(scheme) if alone else (scheme,) for scheme in named.values())
        rules = Rules(Patterns(named), schemes, ignored=Patterns(exclude), spreads=True)
    else:
        whole = BY_ALGO[algo]
        rules = Rules(whole=_perhaps_alone(whole) if alone else (whole,), ignored=Patterns(exclude))
    kv = text(body, "kv_cache_quant_algo", where) or kv_cache_algo(body, where)
    return Quantization(algo, BLOCK_SIZE, exclude, MODELOPT, rules, kv, dict(config))


def merged(main: Mapping[str, Any], sidecar: Mapping[str, Any], where: str) -> dict[str, Any]:
    """config.json's entries; where it has none, those of hf_quant_config.json. What either leaves alone is left alone."""
    body = {**sidecar, **mapping(sidecar, "quantization", where)}
    body.pop("quantization", None)
    own = {key: value for key, value in {**main, **mapping(main, "quantization", where)}.items() if value not in (None, {}, [])}
    own.pop("quantization", None)
    if main and any(key in own for key in _IGNORE):
        own["ignore"] = [n for holder in (own, body) for key in _IGNORE for n in patterns(holder, key, where)]
        own["ignore"] = list(dict.fromkeys(own["ignore"]))
        body = {key: value for key, value in body.items() if key not in _IGNORE}
        own = {key: value for key, value in own.items() if key not in _IGNORE[1:]}
    return {**body, **own, "quant_method": "modelopt"} if main else dict(sidecar)


def _by_layer(layers: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, Scheme]:
    algos = {name: (text(layer, "quant_algo", f"{where}: {name}") or "").upper() for name, layer in layers.items()}
    unknown = sorted(set(algos.values()) - BY_ALGO.keys())
    if unknown:
        raise unsupported(where, f"layers quantized to {', '.join(name or 'nothing' for name in unknown)}")
    return {name: BY_ALGO[algo] for name, algo in algos.items()}


def _by_group(
    groups: Mapping[str, Mapping[str, Any]],
    weights: Mapping[str, Mapping[str, Any]],
    acts: Mapping[str, Mapping[str, Any]],
    where: str,
) -> dict[str, Scheme]:
    """Without an entry for each layer the groups say which module is quantized how."""
    found: dict[str, Scheme] = {}
    for name, group in groups.items():
        bits = weights[name].get("num_bits")
        if bits not in (4, 8) or weights[name].get("type", "float") != "float":
            raise unsupported(where, f"{name} of {bits} bits, type {weights[name].get('type')!r}")
        four = BY_ALGO["NVFP4"] if acts[name] else W4A16
        eight = Scheme("FP8", None if not acts[name] else "token" if weights[name].get("strategy") == "channel" else "stored")
        found |= dict.fromkeys(patterns(group, "targets", f"{where}: {name}"), four if bits == 4 else eight)
    return found


def _perhaps_alone(scheme: Scheme) -> tuple[Scheme, ...]:
    return (scheme, W4A16) if scheme.algo == "NVFP4" else (scheme,)


def _need_blocks_of_16(
    body: Mapping[str, Any],
    algo: str,
    weights: list[Mapping[str, Any]],
    layers: Mapping[str, Mapping[str, Any]],
    where: str,
) -> None:
    own = [body] if algo != "MIXED_PRECISION" else []
    fours = [layer for layer in layers.values() if "NVFP4" in str(layer.get("quant_algo")).upper()]
    for holder in (*own, *weights, *fours):
        if holder.get("group_size") is not None and (size := whole_number(holder, "group_size", where)) != BLOCK_SIZE:
            raise UnsupportedFormatError("NVFP4 has one block scale per 16 values", name=where, expected=BLOCK_SIZE, found=size)


def unsupported(where: str, found: str) -> UnsupportedFormatError:
    """The error about what neither tool's reader knows."""
    return UnsupportedFormatError(
        "this checkpoint is quantized in a way that is not supported",
        name=where,
        expected=f"quant_method 'modelopt' with quant_algo {', '.join(SUPPORTED)} (layers {', '.join(BY_ALGO)}), or "
        "'compressed-tensors' with groups of NVFP4 and FP8",
        found=found,
        remedy="Export the model with ModelOpt's NVFP4_DEFAULT_CFG: aliasparam-nvfp4 quantize MODEL OUT.",
    )
