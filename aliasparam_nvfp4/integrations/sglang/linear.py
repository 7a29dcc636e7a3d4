"""NVFP4 linear layers of SGLang.

Its class takes the place of ``ModelOptFp4LinearMethod`` (``sglang/srt/layers/quantization/modelopt_quant.py``, 0.5.23) and is no
subclass of it: models ask ``isinstance`` before they fuse neighbours into kernel formats of their own. It is not in
``WEIGHT_LOADER_V2_SUPPORTED`` (``layers/linear.py``), so SGLang's first loaders fill it, which write slices of ``param.data``.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.layers.quantization.base_config import LinearMethodBase

from ..engine_linear import EngineLinear
from .options import linear_backend, reads


class AliasedFp4LinearMethod(LinearMethodBase, EngineLinear):  # type: ignore[misc]
    """SGLang's base comes first, or objects of its class could not become ours."""

    quant_mode = "aliased"  # models compare it with "w4a4" before they fuse
    input_scale = True
    create_weights, apply = EngineLinear.create_weights, EngineLinear.apply
    process_weights_after_loading = EngineLinear.process_weights_after_loading

    def __init__(self, quant_config: Any) -> None:
        self.quant_config = quant_config
        options = {"pre_quant_scale": quant_config.is_awq, "input_scale": self.input_scale}
        EngineLinear.__init__(self, linear_backend() or "auto", **options)


class AliasedFp4A16LinearMethod(AliasedFp4LinearMethod):
    """Of weights alone."""

    input_scale = False


def is_ours(quant_config: Any) -> bool:
    """Whether SGLang's NVFP4 and W4A16 methods, which every config makes that has one (ModelOpt's, the mixed and the hybrid one),
    become ours. Subclasses, Marlin and weights that are quantized while they load stay SGLang's."""
    return reads(quant_config) and linear_backend() is not None
