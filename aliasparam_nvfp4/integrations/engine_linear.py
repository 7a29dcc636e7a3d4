"""NVFP4 linear layers as vLLM and SGLang call a quantization method, beside their own base class."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.format import MODELOPT
from ..linear import NvFp4LinearMethod
from .emulated import emulate_on_cpu
from .leftover import pass_over


class EngineLinear:
    """The work is :attr:`method`'s, an :class:`NvFp4LinearMethod` of the options that are given.

    Partitions may have any global scales: output columns are multiplied where there are several. That is decided when the layer
    is made, and by no weights: graphs are captured with the first ones. float16 has not the range for it, so there different
    scales are refused.
    """

    def __init__(self, backend: str, **options: Any) -> None:
        self._made = partial(NvFp4LinearMethod, backend, **options)
        self.method = self._made(column_scales=True)

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
        """See :meth:`NvFp4LinearMethod.create_weights`."""
        self.method = self._made(column_scales=params_dtype is not torch.float16)
        sizes = input_size_per_partition, output_partition_sizes, input_size, output_size
        kept = {"weight_loader": extra_weight_attrs["weight_loader"]} if "weight_loader" in extra_weight_attrs else {}
        self.method.create_weights(layer, *sizes, params_dtype, **kept)
        layer.logical_widths = output_partition_sizes  # type: ignore[assignment]
        layer.input_size_per_partition = input_size_per_partition  # type: ignore[assignment]
        layer.output_size_per_partition = sum(output_partition_sizes)  # type: ignore[assignment]
        if not self.method.input_scale and self.method.checkpoint is MODELOPT:
            pass_over(layer, "input_scale")
        emulate_on_cpu(layer)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.method.process_weights_after_loading(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.method.apply(layer, x, bias)
