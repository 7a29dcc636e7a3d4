"""The ranks of a vLLM engine."""

from __future__ import annotations

from vllm.distributed.parallel_state import get_world_group

from ..agreement import World


def world() -> World:
    group = get_world_group()
    return World.of(group.rank_in_group, group.ranks)
