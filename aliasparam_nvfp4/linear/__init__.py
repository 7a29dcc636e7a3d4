"""NVFP4 linear layers."""

from __future__ import annotations

from .loaders import ShardedLoader as ShardedLoader
from .loaders import load_partition as load_partition
from .method import NvFp4LinearMethod as NvFp4LinearMethod
from .retarget import retarget as retarget
