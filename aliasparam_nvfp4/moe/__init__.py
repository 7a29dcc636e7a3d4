"""NVFP4 mixture-of-experts layers."""

from __future__ import annotations

from .folder import load_experts as load_experts
from .loader import ExpertLoader as ExpertLoader
from .method import NvFp4MoEMethod as NvFp4MoEMethod
from .ranks import ExpertRanks as ExpertRanks
