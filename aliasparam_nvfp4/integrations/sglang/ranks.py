"""What the ranks of a tensor-parallel group tell each other during an update."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.distributed as dist

from aliasparam.errors import AliasError

from ..agreement import World, agree_on

_logger = logging.getLogger(__name__)


def world() -> World:
    """The tensor-parallel group."""
    from sglang.srt.runtime_context import get_parallel

    if not dist.is_initialized():
        return World()
    group = get_parallel().tp_group.cpu_group
    return World.of(dist.get_rank(group), dist.get_process_group_ranks(group))


def attempt(step: Callable[[], object]) -> str | None:
    """What the step raised, as text."""
    try:
        with torch.no_grad():
            step()
    except Exception as error:
        _logger.warning("a weight update failed: %s", error, exc_info=not isinstance(error, AliasError))
        return f"{error}" or type(error).__name__
    return None


def attempt_on_all(step: Callable[[], object]) -> str | None:
    """The same, or what it raised on another rank: all ranks go on, or none."""
    return attempt(lambda: agree_on(world(), step))
