"""NVFP4 linear layers of SGLang.

Its class takes the place of ``ModelOptFp4LinearMethod`` (``sglang/srt/layers/quantization/modelopt_quant.py``, 0.5.23) and is no
subclass of it: models ask ``isinstance`` before they fuse neighbours into kernel formats of their own. It is not in
``WEIGHT_LOADER_V2_SUPPORTED`` (``layers/linear.py``), so SGLang's first loaders fill it, which write slices of ``param.data``.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.layers.quantization.base_config import LinearMethodBase

from ..engine_linear import EngineLinear
from .options import linear_backend

_W4A16 = "ModelOptNvFp4A16LinearMethod"


class AliasedFp4LinearMethod(LinearMethodBase, EngineLinear):  # type: ignore[misc]
    """SGLang's base comes first, or objects of its class could not become ours."""

    quant_mode = "aliased"  # models compare it with "w4a4" before they fuse
    create_weights, apply = EngineLinear.create_weights, EngineLinear.apply
    process_weights_after_loading = EngineLinear.process_weights_after_loading

    def __init__(self, quant_config: Any, *, input_scale: bool = True) -> None:
        self.quant_config = quant_config
        EngineLinear.__init__(self, linear_backend() or "auto", pre_quant_scale=quant_config.is_awq, input_scale=input_scale)


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
