"""NVFP4 mixture-of-experts layers."""

from __future__ import annotations

from .loader import ExpertLoader as ExpertLoader
from .method import NvFp4MoEMethod as NvFp4MoEMethod
