"""The plugin's function."""

from __future__ import annotations

import logging

from ..plugins import VLLM

logger = logging.getLogger("vllm.aliasparam_nvfp4")
_done = False


def register() -> None:
    """Put this package's methods and its reload in place of vLLM's for NVFP4. Does nothing the second time, and nothing but one
    line in the log with a version of vLLM that it does not know."""
    global _done
    if _done:
        return
    if (reason := VLLM.doubt()) is not None:
        logger.warning("aliasparam_nvfp4 is not in place: %s", reason)
        return
    from .answers import read_every_answer
    from .balance import balance_in_kernel_order
    from .check import missing_seams, say_what_serves
    from .compressed import replace_compressed_tensors
    from .experts import replace_experts
    from .failed_step import fail_requests_of_refused_steps
    from .linear import replace_linear
    from .reload import replace_reload
    from .sleep import sleep_without_kernel_names
    from .transfer import register_transfer

    replace_linear()
    replace_experts()
    replace_compressed_tensors()
    replace_reload()
    fail_requests_of_refused_steps()
    sleep_without_kernel_names()
    balance_in_kernel_order()
    register_transfer()
    read_every_answer()
    say_what_serves()
    if missing := missing_seams():
        logger.error("aliasparam_nvfp4 is in place in part only; missing: %s", ", ".join(missing))
    _done = True
