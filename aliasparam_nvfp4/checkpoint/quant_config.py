"""How a checkpoint folder says it is quantized.

ModelOpt has two spellings: ``quantization_config`` in config.json (flat, ``quant_method: modelopt``), and the older
``hf_quant_config.json`` (nested under ``quantization``). compressed-tensors has one, in config.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..checkpoint_format import COMPRESSED_TENSORS, MODELOPT, CheckpointFormat
from ..format import BLOCK_SIZE
from ._entries import kv_cache_algo, mapping, mappings, patterns, whole_number
from .errors import CheckpointError, UnsupportedFormatError

#: ModelOpt's algorithms that are read.
SUPPORTED = ("NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", "MIXED_PRECISION")
#: What compressed-tensors calls a packed NVFP4 checkpoint.
_CT_FORMAT = "nvfp4-pack-quantized"


@dataclass(frozen=True)
class QuantConfig:
    """The quantization of a checkpoint.

    Attributes:
        algo: ModelOpt's name of the algorithm ("NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", "MIXED_PRECISION"); compressed-tensors'
            NVFP4 and NVFP4A16 are "NVFP4" and "W4A16_NVFP4".
        group_size: values per block scale, 16.
        exclude: patterns of modules which are not quantized: globs, or regular expressions after ``re:`` (see :meth:`excludes`).
        tensors: how the files name a module's tensors.
        layers: for MIXED_PRECISION the algorithm of each quantized module; all others are left alone.
        kv_cache_algo: quantization of the KV cache, or None.
        raw: the whole dict as it was read.
    """

    algo: str
    group_size: int
    exclude: tuple[str, ...]
    tensors: CheckpointFormat = MODELOPT
    layers: Mapping[str, str] = field(default_factory=dict, compare=False)
    kv_cache_algo: str | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], *, where: str = "quantization_config") -> QuantConfig:
        """Parse any spelling.

        Raises:
            CheckpointError: an entry which is not of its kind.
            UnsupportedFormatError: another quantization method or algorithm, or another group size.
        """
        if config.get("quant_method") == "compressed-tensors":
            return cls._compressed_tensors(config, where)
        body = config["quantization"] if isinstance(config.get("quantization"), Mapping) else config
        method = config.get("quant_method", "modelopt")
        algo = body.get("quant_algo")
        if method != "modelopt" or algo not in SUPPORTED:
            raise _unsupported(
                config, where, found=f"quant_method {method!r}, quant_algo {algo!r}, format {config.get('format')!r}"
            )
        layers = {n: str(layer.get("quant_algo")) for n, layer in mappings(body, "quantized_layers", where).items()}
        unknown = sorted(set(layers.values()) - {"NVFP4", "W4A16_NVFP4", "FP8"})
        if unknown:
            raise _unsupported(config, where, found=f"layers quantized to {', '.join(unknown)}")
        size = _group_size(body, where)
        if size != BLOCK_SIZE and algo != "MIXED_PRECISION":
            raise UnsupportedFormatError("NVFP4 has one block scale per 16 values", name=where, expected=BLOCK_SIZE, found=size)
        keys = ("ignore", "modules_to_not_convert", "exclude_modules")
        exclude = patterns(body, next((key for key in keys if body.get(key)), "ignore"), where)
        kv = body.get("kv_cache_quant_algo") or kv_cache_algo(body, where)
        return cls(algo, BLOCK_SIZE, exclude, MODELOPT, layers, kv, dict(config))

    @classmethod
    def _compressed_tensors(cls, config: Mapping[str, Any], where: str) -> QuantConfig:
        groups = list(mappings(config, "config_groups", where).values())
        formats = {config.get("format"), *(g.get("format") for g in groups)} - {None}
        weights = [mapping(g, "weights", where) for g in groups]
        nvfp4 = all(w.get("num_bits") == 4 and w.get("type") == "float" and w.get("strategy") == "tensor_group" for w in weights)
        if formats != {_CT_FORMAT} or not groups or not nvfp4 or any(g.get("targets") != ["Linear"] for g in groups):
            raise _unsupported(config, where, found=f"format {sorted(map(str, formats))}, {len(groups)} config groups")
        size = {w.get("group_size") for w in weights}
        if size != {BLOCK_SIZE}:
            raise UnsupportedFormatError("NVFP4 has one block scale per 16 values", name=where, expected=BLOCK_SIZE, found=size)
        algo = "NVFP4" if groups[0].get("input_activations") else "W4A16_NVFP4"
        exclude, kv = patterns(config, "ignore", where), kv_cache_algo(config, where)
        return cls(algo, BLOCK_SIZE, exclude, COMPRESSED_TENSORS, {}, kv, dict(config))

    def algo_of(self, module: str) -> str | None:
        """The algorithm of one linear module by its dotted path, or None if it is not quantized."""
        if self.algo == "MIXED_PRECISION":
            return self.layers.get(module)
        return None if self.excludes(module) else self.algo

    @classmethod
    def from_folder(cls, folder: str | Path) -> QuantConfig:
        """Read the quantization of a checkpoint folder.

        Raises:
            CheckpointError: not a folder, no or broken config.json, or a model that is not quantized.
            UnsupportedFormatError: as :meth:`from_dict`.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(
                "there is no such folder" if not folder.exists() else "this is not a folder",
                name=str(folder),
                expected="a checkpoint folder with config.json and safetensors files",
            )
        config = read_json(folder / "config.json")
        if isinstance(config.get("quantization_config"), Mapping):
            return cls.from_dict(config["quantization_config"], where=str(folder / "config.json"))
        legacy = folder / "hf_quant_config.json"
        if legacy.is_file():
            return cls.from_dict(read_json(legacy), where=str(legacy))
        raise UnsupportedFormatError(
            "this checkpoint is not quantized",
            name=str(folder / "config.json"),
            expected="a quantization_config, or hf_quant_config.json beside it",
            found="neither",
            remedy="Quantize it first: aliasparam-nvfp4 quantize MODEL OUT.",
        )

    def excludes(self, module: str) -> bool:
        """Whether the module is excluded: a glob matches its dotted path, a path above it, or any part of it (SGLang 0.5.23
        ``modelopt_quant.py``); a regular expression matches the beginning of its path (compressed-tensors)."""
        parts = module.split(".")
        paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return any(_matches(module, (*paths, *parts), pattern) for pattern in self.exclude)


def _matches(module: str, names: Iterable[str], pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return any(fnmatchcase(name, pattern) for name in names)


def _unsupported(config: Mapping[str, Any], where: str, *, found: str) -> UnsupportedFormatError:
    return UnsupportedFormatError(
        "this checkpoint is quantized in a way that is not supported",
        name=where,
        expected=f"quant_method 'modelopt' with quant_algo {', '.join(SUPPORTED)} (layers NVFP4, W4A16_NVFP4 or FP8), "
        f"or 'compressed-tensors' in format {_CT_FORMAT} for all linear layers",
        found=found,
        remedy="Export the model with ModelOpt's NVFP4_DEFAULT_CFG: aliasparam-nvfp4 quantize MODEL OUT.",
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a CheckpointError which names it."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError("the file is missing", name=str(path)) from None
    except OSError as error:
        raise CheckpointError(f"the file cannot be read: {error.strerror}", name=str(path)) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the file is not JSON: {error}", name=str(path)) from None
    if not isinstance(value, dict):
        raise CheckpointError("the file does not hold a JSON object", name=str(path), found=type(value).__name__)
    return value


def _group_size(body: Mapping[str, Any], where: str) -> int:
    groups = mappings(body, "config_groups", where).values()
    for holder in (body, *(mapping(group, "weights", where) for group in groups)):
        if "group_size" in holder:
            return whole_number(holder, "group_size", where)
    return BLOCK_SIZE
