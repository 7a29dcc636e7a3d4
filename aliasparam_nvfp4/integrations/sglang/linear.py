"""NVFP4 linear layers of SGLang on :class:`NvFp4LinearMethod`.

Its class takes the place of ``ModelOptFp4LinearMethod`` (``sglang/srt/layers/quantization/modelopt_quant.py``, 0.5.23) and is no
subclass of it: models ask ``isinstance`` before they fuse neighbours into kernel formats of their own. It is not in
``WEIGHT_LOADER_V2_SUPPORTED`` (``layers/linear.py``), so SGLang's first loaders fill it, which write slices of ``param.data``.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.quantization.base_config import LinearMethodBase
from torch import Tensor, nn

from ...linear import NvFp4LinearMethod
from ..emulated import emulate_on_cpu
from ..leftover import pass_over
from .options import linear_backend

_W4A16 = "ModelOptNvFp4A16LinearMethod"


class AliasedFp4LinearMethod(LinearMethodBase):  # type: ignore[misc]
    """SGLang's interface; the work is :attr:`method`'s.

    Partitions may have any global scales: output columns are multiplied where there are several, from the start on, so that no
    captured graph depends on the first weights.
    """

    quant_mode = "aliased"  # models compare it with "w4a4" before they fuse

    def __init__(self, quant_config: Any, *, input_scale: bool = True) -> None:
        self.quant_config = quant_config
        self.method = NvFp4LinearMethod(
            linear_backend() or "auto",
            pre_quant_scale=quant_config.is_awq,
            input_scale=input_scale,
            column_scales=True,
        )

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        layer.logical_widths = output_partition_sizes  # type: ignore[assignment]
        layer.input_size_per_partition = input_size_per_partition  # type: ignore[assignment]
        layer.output_size_per_partition = sum(output_partition_sizes)  # type: ignore[assignment]
        kept = {"weight_loader": extra_weight_attrs["weight_loader"]} if "weight_loader" in extra_weight_attrs else {}
        self.method.create_weights(
            layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **kept
        )
        if not self.method.input_scale:
            pass_over(layer, "input_scale")
        emulate_on_cpu(layer)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.method.process_weights_after_loading(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.method.apply(layer, x, bias)


def take_over(original: Any, method: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND the ``__init__`` of SGLang's NVFP4 and W4A16 methods: an object of the very class becomes one of ours.

    So every config that makes one (ModelOpt's, the mixed and the hybrid one) does. Subclasses, Marlin and weights that are
    quantized while they load stay SGLang's.
    """
    config, stock = args[0] if args else kwargs["quant_config"], type(method).__name__
    ours = stock in ("ModelOptFp4LinearMethod", _W4A16) and config.is_checkpoint_nvfp4_serialized
    if not ours or config.use_per_token_activation or linear_backend() is None:
        original(method, *args, **kwargs)
        return
    method.__class__ = AliasedFp4LinearMethod
    method.__init__(config, input_scale=stock != _W4A16)
