"""vLLM: a general plugin that serves NVFP4 checkpoints through this package's methods and reloads them in one transaction.

vLLM calls :func:`register` in every process (entry point group ``vllm.general_plugins``; ``VLLM_PLUGINS`` names those it may
call). Every seam that it patches is in a file of its own here, which names vLLM's file and function: ``linear.py``,
``experts.py`` and ``compressed.py`` (methods), ``layerwise.py`` and ``reload.py`` (reloads), ``transfer.py`` (updates),
``balance.py``, ``sleep.py``, ``failed_step.py``, ``answers.py``, ``check.py``.
"""

from __future__ import annotations

from .plugin import register as register
