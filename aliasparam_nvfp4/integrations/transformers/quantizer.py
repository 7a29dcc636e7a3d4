"""The transformers quantizer for ModelOpt NVFP4 checkpoints (``quant_method: "modelopt"``, which transformers lacks).

Written for the contract of transformers 5.17 to 5.23: the model is built on the meta device, every Parameter is *replaced* by
``setattr`` while loading, and ``_process_model_after_weight_loading`` runs once at the end. So storage is bound there.
"""

from __future__ import annotations

from collections.abc import Iterator
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

from ...checkpoint import CheckpointFolder, QuantConfig, check_tensors
from ...linear import NvFp4LinearMethod
from .fuse import fuse_projections
from .modules import Projection

_METHOD = "modelopt"
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
    """``quantization_config`` of a ModelOpt checkpoint, kept whole so that saving writes what was read."""

    def __init__(self, **raw: Any) -> None:
        raw.pop("quant_method", None)
        self.raw = dict(raw)
        self.quant_method = _METHOD
        self.parsed = QuantConfig.from_dict({**raw, "quant_method": _METHOD})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return {**self.raw, "quant_method": _METHOD}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class ModelOptQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads NVFP4 linear layers into aliased storage."""

    requires_calibration = True

    def __init__(self, quantization_config: ModelOptConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.method = NvFp4LinearMethod(_backend.get())

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to refuse: every backend loads everywhere."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config: QuantConfig = self.quantization_config.parsed
        dtype = getattr(model.config, "dtype", None) or torch.get_default_dtype()
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and not config.excludes(name):
                with torch.device("meta"):
                    projection = Projection(module.in_features, module.out_features, module.bias is not None, dtype)
                model.set_submodule(name, projection)
        self._check_files(model, kwargs.get("checkpoint_files"))

    def _check_files(self, model: Any, files: list[str] | None) -> None:
        """Hold the files' headers against the model before anything is loaded."""
        if not files:
            return
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        expected = {n: TensorSpec.of(t) for n, t in model.state_dict().items() if n not in tied}
        folder = CheckpointFolder(Path(files[0]).parent)
        # Only quantized tensors must agree in dtype: transformers casts the others as the user asks.
        expected = {
            n: TensorSpec(s.shape, folder.tensors[n].dtype)
            if n in folder.tensors and s.dtype.is_floating_point and s.dtype.itemsize > 1 and not n.endswith("_scale_2")
            else s
            for n, s in expected.items()
        }
        check_tensors(folder, expected, ignore=sorted(tied))

    def update_weight_conversions(self, conversions: Any, model: Any = None) -> Any:
        return conversions

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        with torch.no_grad():
            fuse_projections(model, self.method)
            process(model)

    def get_state_dict_and_metadata(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return checkpoint_state_dict(model), {"format": "pt"}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def register() -> None:
    """Make transformers load ModelOpt NVFP4 checkpoints. Idempotent."""
    if _METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(_METHOD)(ModelOptConfig)
    if _METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(_METHOD)(ModelOptQuantizer)
