"""NVFP4 quantization methods on aliasparam."""

from __future__ import annotations

from .linear import NvFp4LinearMethod as NvFp4LinearMethod
