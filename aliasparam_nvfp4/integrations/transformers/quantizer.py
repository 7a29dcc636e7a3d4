"""The transformers quantizer for NVFP4 checkpoints: ModelOpt's (``quant_method: "modelopt"``, which transformers lacks) and,
where asked for, compressed-tensors' (which transformers decompresses to bf16).

Written for the contract of transformers 5.17 to 5.23: the model is built on the meta device, every Parameter is *replaced* by
``setattr`` while loading, and ``_process_model_after_weight_loading`` runs once at the end. So storage is bound there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from aliasparam import checkpoint_state_dict, process
from aliasparam.errors import AliasError

from ...checkpoint import QuantConfig
from ...linear.backends import linear_backend
from ...moe import ExpertRanks
from ...moe.runners import moe_runner
from ...quantize.missing import Missing, need_policy
from .carried import carry
from .experts import ExpertChoice, Experts, replace_experts, show_apart
from .fp8 import Fp8Linear
from .fuse import fuse_projections
from .fused_experts import FusedExperts
from .linears import replace_linears
from .modules import Projection
from .names import Names, revert, speak_file_names
from .placement import need_one_device, need_undivided
from .report import FolderReport
from .scales import refused_scalars
from .source import Source, narrowed

_METHODS = ("modelopt", "modelopt_fp4", "modelopt_mixed")


@dataclass(frozen=True)
class Choice:
    """What models are loaded with: a linear backend, experts' runner and this process's part of them, and the linear backends to
    which the loaded model may be moved."""

    backend: str = "auto"
    experts: ExpertChoice = field(default_factory=ExpertChoice)
    retarget_to: tuple[str, ...] = ()


_choice: ContextVar[Choice] = ContextVar("aliasparam_nvfp4_backend")


@contextmanager
def use_backend(
    name: str = "auto",
    *,
    moe: str = "auto",
    ranks: ExpertRanks | None = None,
    retarget_to: Sequence[str] = (),
    missing_input_scale: Missing = "refuse",
) -> Iterator[None]:
    """Models loaded inside this block use the linear backend ``name`` and the MoE runner ``moe``.

    With ``ranks`` each process reads and holds its own part of the experts, and the results are added up over the default
    process group of ``torch.distributed``; all other layers are whole in every process. ``retarget_to`` plans room for the linear
    backends to which :func:`aliasparam_nvfp4.retarget` may move the model. ``missing_input_scale`` says what counts for
    layers and experts whose activations were not calibrated: "refuse" them; "max", the largest of the fused layer or of its
    experts; or "dynamic" (each token) and "dynamic-tensor" (each call), scales computed at run time, where the backend can.

    Raises:
        ScaleError: no such policy.
    """
    need_policy(missing_input_scale)
    token = _choice.set(Choice(name, ExpertChoice(moe, ranks or ExpertRanks(), missing_input_scale), tuple(retarget_to)))
    try:
        yield
    finally:
        _choice.reset(token)


class ModelOptConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` of an NVFP4 checkpoint, kept whole so that saving writes what was read."""

    method = _METHODS[0]

    def __init__(self, **raw: Any) -> None:
        self.raw = {key: value for key, value in raw.items() if key != "quant_method"}
        self.quant_method = self.method

    @property
    def parsed(self) -> QuantConfig:
        """Raises CheckpointError and UnsupportedFormatError, see :meth:`QuantConfig.from_dict`."""
        return QuantConfig.from_dict(self.to_dict())

    def of_folder(self, folder: Path) -> QuantConfig:
        """The same, with what hf_quant_config.json adds where this is a stub."""
        parsed = QuantConfig.from_folder(folder)
        self.raw = {key: value for key, value in parsed.raw.items() if key != "quant_method"}
        return parsed

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return {**self.raw, "quant_method": self.method}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class CompressedTensorsConfig(ModelOptConfig):
    """The same of a compressed-tensors checkpoint."""

    method = "compressed-tensors"


class ModelOptQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads NVFP4 linear layers and experts into aliased storage."""

    requires_calibration = True

    def __init__(self, quantization_config: ModelOptConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.choice = _choice.get(Choice())
        for name in (self.choice.backend, *self.choice.retarget_to):
            linear_backend(name)  # an unknown name fails before anything is read
        moe_runner(self.choice.experts.runner)
        #: What became of the folder's tensors.
        self.report = FolderReport()
        #: What the model calls the folder's tensors.
        self.names = Names()
        self._source = Source()
        self._plain_experts: list[str] = []
        self._renamed: dict[str, torch.dtype] = {}

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Every backend loads everywhere. transformers asks twice: with the map as it was given, and with what it made of it.

        Raises:
            CheckpointError: a map that divides the model.
        """
        need_one_device(device_map)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        need_undivided(model)
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        files = kwargs.get("checkpoint_files")
        folder = Path(files[0]).parent if files else None
        config = self.quantization_config.parsed if folder is None else self.quantization_config.of_folder(folder)
        self._source = source = Source.of(model, folder, files) if folder else Source()
        schemes = partial(source.schemes_of_experts, config)
        replace_experts(model, source.experts, schemes, source.tensors, config.tensors, self.choice.experts, dtype)
        plain = replace_linears(model, config, source, dtype, self.choice.experts.missing_input_scale)
        for kind in {module.kind for module in model.modules() if isinstance(module, Projection)}:
            kind.method(self.choice.backend, self.choice.retarget_to)  # refuses before weights are read
        carried = carry(model, source.tensors)
        self.report = source.check(model, carried, plain)
        self.report.say(str(folder))
        self.names = source.names
        self._renamed = source.renamed_dtypes(model)
        self._plain_experts = source.plain_experts(model)
        ours = {re.escape(f"{path}.") for path, module in model.named_modules() if isinstance(module, Experts)}
        dropped = {f"^{re.escape(source.names.ours[name])}$" for name in self.report.dropped}
        ignored: Any = model._keys_to_ignore_on_load_unexpected
        model.__dict__["_class_ignores"] = tuple(ignored or ())
        model.__dict__["_keys_to_ignore_on_load_unexpected"] = {*(ignored or ()), *ours, *dropped}

    def refused_scalars(self, model: nn.Module) -> Iterator[AliasError]:
        """What loading ``model``, which was preprocessed on the meta device, would refuse of global scales and
        backends. It is spent."""
        return refused_scalars(model, self._source, self.choice.backend)

    def update_weight_conversions(self, conversions: Any, model: Any = None) -> Any:
        return narrowed(conversions, self._plain_experts)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        source, self._source = self._source, Source()
        with torch.no_grad():
            for name, dtype in self._renamed.items():  # transformers 5.17 leaves them in the dtype of the file
                parameter = model.get_parameter(name)
                parameter.data = parameter.data.to(dtype)
            for path, module in list(model.named_modules()):
                if isinstance(module, Experts) and source.folder is not None:
                    block = model.get_submodule(path.rpartition(".")[0])
                    module.load(source.folder, source.experts[path], next(block.parameters()).device)
                if isinstance(module, FusedExperts):
                    module.attach()
                if isinstance(module, Fp8Linear):
                    module.check_scales(path, module.get_parameter)
            for path in self._plain_experts:
                show_apart(model.get_submodule(path), source.experts[path])
            if source.folder is not None:
                source.folder.check_unchanged()
            fuse_projections(model, self.choice.backend, self.choice.retarget_to)
            process(model)
        speak_file_names(model, source.names)
        model.__dict__["_weight_conversions"] = []  # the state dict has the files' names already
        if source.folder is not None:
            source.folder.close()

    def get_state_dict_and_metadata(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = checkpoint_state_dict(model)
        revert(model, state, self.names.conversions)
        return state, {"format": "pt"}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


@contextmanager
def compressed_tensors_here() -> Iterator[None]:
    """Inside the block transformers loads compressed-tensors NVFP4 checkpoints with this package instead of its own code."""
    name = CompressedTensorsConfig.method
    before = AUTO_QUANTIZATION_CONFIG_MAPPING.get(name), AUTO_QUANTIZER_MAPPING.get(name)
    AUTO_QUANTIZATION_CONFIG_MAPPING[name], AUTO_QUANTIZER_MAPPING[name] = CompressedTensorsConfig, ModelOptQuantizer
    try:
        yield
    finally:
        for mapping, old in zip((AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING), before, strict=True):
            if old is None:
                mapping.pop(name)
            else:
                mapping[name] = old


def register() -> None:
    """Make transformers load ModelOpt NVFP4 checkpoints. Idempotent."""
    for method in _METHODS:
        if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
            register_quantization_config(method)(ModelOptConfig)
        if method not in AUTO_QUANTIZER_MAPPING:
            register_quantizer(method)(ModelOptQuantizer)
