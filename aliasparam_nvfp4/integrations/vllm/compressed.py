"""compressed-tensors checkpoints: what stands for ``CompressedTensorsW4A4Fp4`` and ``CompressedTensorsW4A4Nvfp4MoEMethod`` of
vllm/model_executor/layers/quantization/compressed_tensors/ (0.32.0).
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsScheme

from ...checkpoint.format import COMPRESSED_TENSORS
from ...errors import BackendError
from .experts import ModelOptNvFp4Experts
from .linear import NvFp4Linear


class NvFp4Scheme(CompressedTensorsScheme):  # type: ignore[misc]
    """Says that a layer is NVFP4, where vLLM's scheme chooses a kernel at once and fails without one."""

    def __init__(self, use_a16: bool = False) -> None:
        self.use_a16 = use_a16

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise BackendError("linear transforms of NVFP4 layers are not served", remedy="Export without transform_config.")

    create_weights = apply_weights = process_weights_after_loading = _refuse


class CompressedTensorsNvFp4Experts(ModelOptNvFp4Experts):
    """Loaded by this package's :class:`~aliasparam_nvfp4.moe.loader.ExpertLoader`: vLLM's knows no scales of these names here."""

    checkpoint = COMPRESSED_TENSORS
    supports_eplb = False

    def __init__(self, moe: Any, layer_name: str | None = None, use_a16: bool = False) -> None:
        FusedMoEMethodBase.__init__(self, moe)
        self.quant_config, self.input_scale, self.method = None, not use_a16, None


def get_quant_method(original: Any, config: Any, layer: nn.Module, prefix: str) -> Any:
    """AROUND ``CompressedTensorsConfig.get_quant_method``."""
    method, scheme = original(config, layer, prefix), getattr(layer, "scheme", None)
    if isinstance(scheme, NvFp4Scheme) and isinstance(method, CompressedTensorsLinearMethod):
        return NvFp4Linear(input_scale=not scheme.use_a16, checkpoint=COMPRESSED_TENSORS)
    return method
