"""How a checkpoint folder says it is quantized.

Two spellings: ``quantization_config`` in config.json (flat, ``quant_method: modelopt``), and the older
``hf_quant_config.json`` (nested under ``quantization``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..format import BLOCK_SIZE
from .errors import CheckpointError, UnsupportedFormatError

SUPPORTED = ("NVFP4",)


@dataclass(frozen=True)
class QuantConfig:
    """The quantization of a checkpoint.

    Attributes:
        algo: ModelOpt's name of the algorithm, "NVFP4".
        group_size: values per block scale, 16.
        exclude: glob patterns of modules which are not quantized.
        kv_cache_algo: quantization of the KV cache, or None.
        raw: the whole dict as it was read.
    """

    algo: str
    group_size: int
    exclude: tuple[str, ...]
    kv_cache_algo: str | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], *, where: str = "quantization_config") -> QuantConfig:
        """Parse either spelling.

        Raises:
            UnsupportedFormatError: another quantization method or algorithm, or another group size.
        """
        body = config["quantization"] if isinstance(config.get("quantization"), Mapping) else config
        method = config.get("quant_method", "modelopt")
        algo = body.get("quant_algo")
        if method != "modelopt" or algo not in SUPPORTED:
            raise UnsupportedFormatError(
                "this checkpoint is quantized in a way that is not supported",
                name=where,
                expected=f"quant_method 'modelopt' with quant_algo {' or '.join(SUPPORTED)}",
                found=f"quant_method {method!r}, quant_algo {algo!r}, format {config.get('format')!r}",
                remedy="Export the model with ModelOpt's NVFP4_DEFAULT_CFG: aliasparam-nvfp4 quantize MODEL OUT.",
            )
        size = _group_size(body)
        if size != BLOCK_SIZE:
            raise UnsupportedFormatError("NVFP4 has one block scale per 16 values", name=where, expected=BLOCK_SIZE, found=size)
        exclude = body.get("ignore") or body.get("modules_to_not_convert") or body.get("exclude_modules") or ()
        scheme = body.get("kv_cache_scheme")
        kv = body.get("kv_cache_quant_algo") or (f"FP{scheme['num_bits']}" if scheme else None)
        return cls(algo, size, tuple(exclude), kv, dict(config))

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
        """Whether a pattern matches the module's dotted path, its last part, or a path above it."""
        parts = module.split(".")
        prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return any(fnmatchcase(c, p) for p in self.exclude for c in (*prefixes, parts[-1]))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a CheckpointError which names it."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError("the file is missing", name=str(path)) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the file is not JSON: {error}", name=str(path)) from None
    if not isinstance(value, dict):
        raise CheckpointError("the file does not hold a JSON object", name=str(path), found=type(value).__name__)
    return value


def _group_size(body: Mapping[str, Any]) -> int:
    if "group_size" in body:
        return int(body["group_size"])
    for group in (body.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        if "group_size" in weights:
            return int(weights["group_size"])
    return BLOCK_SIZE
