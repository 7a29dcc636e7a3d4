"""The transformers quantizer for NVFP4 checkpoints: ModelOpt's (``quant_method: "modelopt"``, which transformers lacks) and,
where asked for, compressed-tensors' (which transformers decompresses to bf16).

Written for the contract of transformers 5.17 to 5.23: the model is built on the meta device, every Parameter is *replaced* by
``setattr`` while loading, and ``_process_model_after_weight_loading`` runs once at the end. So storage is bound there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from aliasparam import TensorSpec, checkpoint_state_dict, process

from ...backends import linear_backend
from ...checkpoint import CheckpointFolder, QuantConfig, check_tensors
from .fp8 import Fp8Linear
from .fuse import fuse_projections
from .modules import Projection, ProjectionKind

_METHOD = "modelopt"
#: float32 tensors whose dtype in the file must be the model's.
_SCALARS = ("_scale_2", "_global_scale", "input_scale", "k_scale", "v_scale")
_backend: ContextVar[str] = ContextVar("aliasparam_nvfp4_backend", default="auto")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Models loaded inside this block use the backend ``name``."""
    token = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(token)


class ModelOptConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` of an NVFP4 checkpoint, kept whole so that saving writes what was read."""

    method = _METHOD

    def __init__(self, **raw: Any) -> None:
        raw.pop("quant_method", None)
        self.raw = dict(raw)
        self.quant_method = self.method
        self.parsed = QuantConfig.from_dict({**raw, "quant_method": self.method})

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
    """Loads NVFP4 linear layers into aliased storage."""

    requires_calibration = True

    def __init__(self, quantization_config: ModelOptConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.backend = _backend.get()
        linear_backend(self.backend)  # an unknown name fails before anything is read

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to refuse: every backend loads everywhere."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config: QuantConfig = self.quantization_config.parsed
        dtype = getattr(model.config, "dtype", None) or torch.get_default_dtype()
        files = kwargs.get("checkpoint_files")
        folder = CheckpointFolder(Path(files[0]).parent) if files else None
        stored = folder.tensors if folder else {}
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and (algo := config.algo_of(name)) is not None:
                shape = (module.in_features, module.out_features, module.bias is not None, dtype)
                with torch.device("meta"):
                    made = Fp8Linear(*shape) if algo == "FP8" else Projection(*shape, _kind(config, name, algo, stored))
                model.set_submodule(name, made)
        if folder:
            self._check_files(model, folder)

    def _check_files(self, model: Any, folder: CheckpointFolder) -> None:
        """Hold the files' headers against the model before anything is loaded."""
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        expected = {n: TensorSpec.of(t) for n, t in model.state_dict().items() if n not in tied}
        # Only quantized tensors must agree in dtype: transformers casts the others as the user asks.
        expected = {
            n: TensorSpec(s.shape, folder.tensors[n].dtype)
            if n in folder.tensors and s.dtype.is_floating_point and s.dtype.itemsize > 1 and not n.endswith(_SCALARS)
            else s
            for n, s in expected.items()
        }
        check_tensors(folder, expected, ignore=sorted(tied))

    def update_weight_conversions(self, conversions: Any, model: Any = None) -> Any:
        return conversions

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        with torch.no_grad():
            fuse_projections(model, self.backend)
            process(model)

    def get_state_dict_and_metadata(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return checkpoint_state_dict(model), {"format": "pt"}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _kind(config: QuantConfig, name: str, algo: str, stored: Mapping[str, Any]) -> ProjectionKind:
    """The tensors of one projection: those of its algorithm, and the optional ones which the files have."""
    return ProjectionKind(
        names=config.tensors,
        input_scale=algo != "W4A16_NVFP4",
        pre_quant_scale=f"{name}.pre_quant_scale" in stored,
        kept=tuple(extra for extra in ("k_scale", "v_scale") if f"{name}.{extra}" in stored),
    )


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
    if _METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(_METHOD)(ModelOptConfig)
    if _METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(_METHOD)(ModelOptQuantizer)
