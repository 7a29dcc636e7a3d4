"""Processes of a group, forked from one that has imported the packages already: a spawned one imports them for seconds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch.multiprocessing as mp

#: Imported once for all tests of a session that start processes; none of them computes anything when it is imported.
PRELOADED = ("torch.distributed", "aliasparam.reload", "aliasparam_nvfp4.linear", "aliasparam_nvfp4.moe")
TRANSFORMERS = ("aliasparam_nvfp4.integrations.transformers", "transformers.generation", "transformers.models.auto.modeling_auto")


def imported_context() -> Any:
    """The context to start processes in, of the standard library."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, *(TRANSFORMERS if find_spec("transformers") is not None else ())])
    return context


def run_ranks(function: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    """``function(rank, *arguments)`` in ``count`` processes; raises what one of them raised."""
    imported_context()
    mp.start_processes(function, args=arguments, nprocs=count, start_method="forkserver")
