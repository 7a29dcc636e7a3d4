"""The one description of how a checkpoint is quantized; _modelopt.py and _compressed_tensors.py read their spellings into it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..quantize.format import BLOCK_SIZE
from .errors import CheckpointError, UnsupportedFormatError
from .format import MODELOPT, CheckpointFormat
from .patterns import Patterns
from .scheme import Scheme, fitting
from .special import need_plain_files

#: Module names which one fused name stands for, as configs for engines have it.
_FUSED = {
    "q_proj": ("qkv_proj",), "k_proj": ("qkv_proj",), "v_proj": ("qkv_proj",), "gate_proj": ("gate_up_proj",),
    "up_proj": ("gate_up_proj",), "w1": ("gate_up_proj", "w13"), "w3": ("gate_up_proj", "w13"), "w2": ("down_proj",),
}  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """What is quantized how.

    Attributes:
        targets: patterns of modules; without one that matches a module is left alone.
        schemes: of each target, by precedence.
        whole: of every linear module, where no target says otherwise.
        ignored: modules that are left alone, whatever else says.
        spreads: a target's name stands for modules under it and for the parts of a fused one.
    """

    targets: Patterns = field(default_factory=lambda: Patterns(()))
    schemes: tuple[tuple[Scheme, ...], ...] = ()
    whole: tuple[Scheme, ...] = ()
    ignored: Patterns = field(default_factory=lambda: Patterns(()))
    spreads: bool = False

    def of(self, module: str) -> tuple[Scheme, ...]:
        """The schemes of a linear module, by precedence; none where it is left alone."""
        if module in self.ignored:
            return ()
        found = [s for name in self._names(module) for number in self.targets.all(name) for s in self.schemes[number]]
        return (*dict.fromkeys(found), *self.whole)

    def _names(self, module: str) -> list[str]:
        """The module's own name, then fused names that stand for it."""
        if not self.spreads:
            return [module]
        parent, _, leaf = module.rpartition(".")
        block, _, number = parent.rpartition(".")
        holders = [parent, block] if number.isdigit() else [parent]  # experts.3.w1 is a part of experts.w13
        return [module, *(f"{holder}.{fused}" for holder in holders for fused in (*_FUSED.get(leaf, ()), leaf))]


@dataclass(frozen=True)
class QuantConfig:
    """The quantization of a checkpoint.

    Attributes:
        algo: ModelOpt's name of the algorithm ("NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", "MIXED_PRECISION"), whoever wrote the files.
        group_size: values per block scale, 16.
        exclude: patterns of modules which are not quantized, in the dialect of who wrote them (see patterns.py).
        tensors: how the files name a module's tensors.
        rules: what :meth:`schemes_of` goes by.
        kv_cache_algo: quantization of the KV cache, or None.
        raw: the whole dict as it was read.
    """

    algo: str
    group_size: int = BLOCK_SIZE
    exclude: tuple[str, ...] = ()
    tensors: CheckpointFormat = MODELOPT
    rules: Rules = field(default_factory=Rules, compare=False)
    kv_cache_algo: str | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], *, where: str = "quantization_config") -> QuantConfig:
        """Parse any spelling.

        Raises:
            CheckpointError: an entry which is not of its kind.
            UnsupportedFormatError: another quantization method or algorithm, or another group size.
        """
        from . import _compressed_tensors, _modelopt  # they build this class

        if _compressed_tensors.wrote(config):
            return _compressed_tensors.read(config, where)
        return _modelopt.read(config, where)

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
        from . import _modelopt

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

    def schemes_of(self, *names: str) -> tuple[Scheme, ...]:
        """What the config says of one linear module, by precedence; nothing where it is left alone.

        Args:
            names: what the module is called; the files' name first, and the model's own where it differs. Exporters use either.
        """
        found = [self.rules.of(name) for name in dict.fromkeys(names)]
        if not all(found) and any(name in self.rules.ignored for name in names):
            return ()
        return next((schemes for schemes in found if schemes), ())

    def scheme_of(self, *names: str, fp4: bool | None = None, stored: bool | None = None) -> Scheme | None:
        """The one that fits the file's tensors, see :func:`~aliasparam_nvfp4.checkpoint.scheme.fitting`."""
        return fitting(self.schemes_of(*names), fp4=fp4, stored=stored)

    def algo_of(self, module: str) -> str | None:
        """The algorithm of one linear module by its dotted path, or None if it is not quantized."""
        scheme = self.scheme_of(module)
        return None if scheme is None else scheme.algo

    def excludes(self, module: str) -> bool:
        """Whether a pattern of ``exclude`` matches the module."""
        return module in self.rules.ignored


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
