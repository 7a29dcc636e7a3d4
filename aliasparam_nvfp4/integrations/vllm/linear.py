"""Linear layers. Seam: ``LINEAR_METHOD_BUILDERS`` of vllm/model_executor/layers/quantization/modelopt.py, which
``build_linear_method`` asks first; tried on 0.32.0.

The class is not in vLLM's ``WEIGHT_LOADER_V2_SUPPORTED``, so layers load by ``weight_loader``, which writes ``param.data`` and
slices of it: that is how :class:`aliasparam.AliasedParameter` is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.layers.quantization import modelopt

from ...checkpoint.format import MODELOPT, CheckpointFormat
from ...linear import NvFp4LinearMethod
from ..emulated import emulate_on_cpu
from ..leftover import pass_over
from .options import options


class NvFp4Linear(LinearMethodBase):  # type: ignore[misc]
    """:class:`NvFp4LinearMethod` with vLLM's base class.

    Args:
        input_scale: False for W4A16 checkpoints.
        checkpoint: whose names the layer has.
    """

    def __init__(self, *, input_scale: bool = True, checkpoint: CheckpointFormat = MODELOPT) -> None:
        self.input_scale, self.checkpoint, self.name = input_scale, checkpoint, options().backend
        self.method = self._method(column_scales=True)

    def _method(self, *, column_scales: bool) -> NvFp4LinearMethod:
        return NvFp4LinearMethod(self.name, checkpoint=self.checkpoint, input_scale=self.input_scale, column_scales=column_scales)

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: Sequence[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """See :meth:`NvFp4LinearMethod.create_weights`. Whether columns are multiplied is decided here, and by no weights: vLLM
        captures its graphs with the first ones. float16 has not the range for it, so there different scales are refused."""
        self.method = self._method(column_scales=params_dtype is not torch.float16)
        sizes = input_size_per_partition, output_partition_sizes, input_size, output_size
        self.method.create_weights(layer, *sizes, params_dtype, **extra_weight_attrs)
        layer.logical_widths = output_partition_sizes  # type: ignore[assignment]
        layer.input_size_per_partition = input_size_per_partition  # type: ignore[assignment]
        layer.output_size_per_partition = sum(output_partition_sizes)  # type: ignore[assignment]
        if not self.input_scale and self.checkpoint is MODELOPT:
            pass_over(layer, "input_scale")
        emulate_on_cpu(layer)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.method.process_weights_after_loading(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.method.apply(layer, x, bias)


def replace_linear() -> None:
    modelopt.LINEAR_METHOD_BUILDERS["NVFP4"] = lambda config, prefix: NvFp4Linear()
    modelopt.LINEAR_METHOD_BUILDERS["W4A16_NVFP4"] = lambda config, prefix: NvFp4Linear(input_scale=False)
