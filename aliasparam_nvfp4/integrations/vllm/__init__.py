"""vLLM: a general plugin that serves NVFP4 checkpoints through this package's methods and reloads them in one transaction.

vLLM calls :func:`register` in every process (entry point group ``vllm.general_plugins``; ``VLLM_PLUGINS`` names those it may
call). ``plugin.py`` has the table of what it replaces in vLLM.
"""

from __future__ import annotations

from .plugin import register as register
