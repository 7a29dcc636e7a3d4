"""SGLang: NVFP4 layers on this library's methods, and weight updates that are whole or refused.

An entry point of the group ``sglang.srt.plugins`` calls :func:`register` in every process of an engine; see docs/nvfp4/sglang.md.
"""

from __future__ import annotations

from .plugin import register as register
