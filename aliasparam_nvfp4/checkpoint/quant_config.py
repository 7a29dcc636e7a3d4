"""Reading how a checkpoint is quantized; _modelopt.py and _compressed_tensors.py know their spellings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import _compressed_tensors, _modelopt
from .errors import CheckpointError, UnsupportedFormatError
from .rules import Quantization
from .special import need_plain_files


class QuantConfig(Quantization):
    """The quantization of a checkpoint, read from its config. The fields are those of :class:`Quantization`."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], *, where: str = "quantization_config") -> QuantConfig:
        """Parse any spelling.

        Raises:
            CheckpointError: an entry which is not of its kind.
            UnsupportedFormatError: another quantization method or algorithm, or another group size.
        """
        reader = _compressed_tensors if _compressed_tensors.wrote(config) else _modelopt
        return cls(**vars(reader.read(config, where)))

    @classmethod
    def from_folder(cls, folder: str | Path) -> QuantConfig:
        """Read the quantization of a checkpoint folder; hf_quant_config.json adds what config.json does not say.

        Raises:
            CheckpointError: not a folder, no or broken config.json.
            UnsupportedFormatError: a model that is not quantized, or as :meth:`from_dict`.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(
                "there is no such folder" if not folder.exists() else "this is not a folder",
                name=str(folder),
                expected="a checkpoint folder with config.json and safetensors files",
            )
        need_plain_files(folder)
        main, sidecar = _in_config(read_json(folder / "config.json")), folder / "hf_quant_config.json"
        if sidecar.is_file() and (main is None or _modelopt.wrote(main)):
            merged = _modelopt.merged(main or {}, read_json(sidecar), str(sidecar))
            return cls.from_dict(merged, where=str(sidecar if main is None else folder / "config.json"))
        if main is not None:
            return cls.from_dict(main, where=str(folder / "config.json"))
        raise UnsupportedFormatError(
            "this checkpoint is not quantized",
            name=str(folder / "config.json"),
            expected="a quantization_config, or hf_quant_config.json beside it",
            found="neither",
            remedy="Quantize it first: aliasparam-nvfp4 quantize MODEL OUT.",
        )


def _in_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization in a config.json: of the model, or of its language model."""
    for holder in (config, *(config.get(key) for key in ("text_config", "llm_config", "language_config"))):
        if isinstance(holder, Mapping) and isinstance(holder.get("quantization_config"), Mapping):
            found: Mapping[str, Any] = holder["quantization_config"]
            return found
    return None


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
