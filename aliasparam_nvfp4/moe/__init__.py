"""NVFP4 mixture-of-experts layers."""

from __future__ import annotations

from .activation import GEGLU as GEGLU
from .activation import RELU2 as RELU2
from .activation import SWIGLU as SWIGLU
from .activation import ExpertActivation as ExpertActivation
from .folder import load_experts as load_experts
from .loader import ExpertLoader as ExpertLoader
from .method import NvFp4MoEMethod as NvFp4MoEMethod
from .ranks import ExpertRanks as ExpertRanks
from .retarget import retarget_experts as retarget_experts
from .stored import GPT_OSS as GPT_OSS
from .stored import ROWS as ROWS
from .stored import Stored as Stored
