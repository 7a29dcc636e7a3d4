"""What the ranks of a tensor-parallel group tell each other during an update."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from aliasparam.errors import AliasError

_logger = logging.getLogger(__name__)


def rank_of() -> tuple[int, int]:
    """(this rank, ranks) of the group."""
    group = _group()
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def agree(problem: str | None) -> str | None:
    """What is wrong on this rank, or else on another; None where nothing is on any.

    By a collective on the CPU group, as SGLang's scheduler hands its requests on (``sglang/srt/managers/scheduler.py``): a rank
    that is gone ends the engine either way.
    """
    group = _group()
    if group is None:
        return problem
    said: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(said, problem, group=group)
    others = [f"rank {rank}: {text}" for rank, text in enumerate(said) if text is not None]
    return problem if problem is not None or not others else others[0]


def attempt(step: Callable[[], object]) -> str | None:
    """What the step raised, as text."""
    try:
        with torch.no_grad():
            step()
    except Exception as error:
        _logger.warning("a weight update failed: %s", error, exc_info=not isinstance(error, AliasError))
        return f"{error}" or type(error).__name__
    return None


def _group() -> Any:
    from sglang.srt.runtime_context import get_parallel

    if not dist.is_initialized():
        return None
    group = get_parallel().tp_group.cpu_group
    return group if dist.get_world_size(group) > 1 else None
