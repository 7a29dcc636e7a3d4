"""NVFP4 quantization methods on aliasparam.

Names are imported when they are used, so that the command line speaks before torch is there.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arrival import quantize_on_arrival as quantize_on_arrival
    from .checkpoint.format import COMPRESSED_TENSORS as COMPRESSED_TENSORS
    from .checkpoint.format import MODELOPT as MODELOPT
    from .checkpoint.format import CheckpointFormat as CheckpointFormat
    from .linear import NvFp4LinearMethod as NvFp4LinearMethod
    from .linear import ShardedLoader as ShardedLoader
    from .linear import load_partition as load_partition
    from .linear import retarget as retarget
    from .moe import ExpertActivation as ExpertActivation
    from .moe import ExpertLoader as ExpertLoader
    from .moe import NvFp4MoEMethod as NvFp4MoEMethod
    from .moe import retarget_experts as retarget_experts

_MODULES = {
    ".arrival": ("quantize_on_arrival",),
    ".checkpoint.format": ("COMPRESSED_TENSORS", "MODELOPT", "CheckpointFormat"),
    ".linear": ("NvFp4LinearMethod", "ShardedLoader", "load_partition", "retarget"),
    ".moe": ("ExpertActivation", "ExpertLoader", "NvFp4MoEMethod", "retarget_experts"),
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
