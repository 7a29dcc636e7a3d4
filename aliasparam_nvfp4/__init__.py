"""NVFP4 quantization methods on aliasparam."""

from __future__ import annotations

from .checkpoint_format import COMPRESSED_TENSORS as COMPRESSED_TENSORS
from .checkpoint_format import MODELOPT as MODELOPT
from .checkpoint_format import CheckpointFormat as CheckpointFormat
from .linear import NvFp4LinearMethod as NvFp4LinearMethod
from .linear import retarget as retarget
from .loaders import ShardedLoader as ShardedLoader
from .loaders import load_partition as load_partition
from .moe import ExpertActivation as ExpertActivation
from .moe import ExpertLoader as ExpertLoader
from .moe import NvFp4MoEMethod as NvFp4MoEMethod
from .moe import retarget_experts as retarget_experts
