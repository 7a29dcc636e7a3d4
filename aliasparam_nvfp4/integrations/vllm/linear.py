"""Linear layers.

The class is not in vLLM's ``WEIGHT_LOADER_V2_SUPPORTED``, so layers load by ``weight_loader``, which writes ``param.data`` and
slices of it: that is how :class:`aliasparam.AliasedParameter` is written.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.linear import LinearMethodBase

from ...checkpoint.format import MODELOPT, CheckpointFormat
from ..engine_linear import EngineLinear
from .options import options


class NvFp4Linear(EngineLinear, LinearMethodBase):  # type: ignore[misc]
    """
    Args:
        input_scale: False for W4A16 checkpoints.
        checkpoint: whose names the layer has.
    """

    def __init__(self, *, input_scale: bool = True, checkpoint: CheckpointFormat = MODELOPT) -> None:
        super().__init__(options().backend, input_scale=input_scale, checkpoint=checkpoint)


def build(original: Any, config: Any, algo: str, prefix: str) -> Any:
    """AROUND ``build_linear_method`` (vllm/model_executor/layers/quantization/modelopt.py, 0.32.0), which all configs ask."""
    ours = {"NVFP4": True, "W4A16_NVFP4": False}
    return NvFp4Linear(input_scale=ours[algo]) if algo in ours else original(config, algo, prefix)
