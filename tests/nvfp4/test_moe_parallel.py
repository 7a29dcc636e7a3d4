"""Tensor and expert parallelism by real processes over gloo, across a reload."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from ..processes import run_ranks
from .moe_layers import MoE, checkpoint, choices, load

E, H, I = 4, 128, 256  # noqa: E741


def ranks(rank: int, folder: str) -> None:
    """All of four, then the first two and the last two of them by themselves."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    try:
        groups = {2: dist.new_subgroups(2)[0], 4: dist.group.WORLD}
        for size, group in groups.items():
            for how in ("tp", "ep"):
                divided(rank % size, size, how, group)
    finally:
        dist.destroy_process_group()


def divided(rank: int, size: int, how: str, group: dist.ProcessGroup | None) -> None:
    if how == "tp":
        layer = MoE("reference", E, H, I // size, tp_rank=rank, tp_size=size)
    else:
        layer = MoE("reference", E // size, H, I, ep_rank=rank, ep_size=size)
    whole, (x, weights, ids) = MoE("reference", E, H, I), choices(6, E, H)
    answers = []
    for seed in (0, 1, 0):
        tensors = checkpoint(E, H, I, seed)
        load(layer, tensors)
        load(whole, tensors)
        out = layer(x, weights, ids)
        dist.all_reduce(out, group=group)
        torch.testing.assert_close(out, whole(x, weights, ids), rtol=1e-4, atol=1e-5)
        answers.append(out)
    assert torch.equal(answers[0], answers[2]), "A again is A"
    assert not torch.equal(answers[0], answers[1])


def test_ranks_give_the_result_of_one_process(tmp_path: Path) -> None:
    run_ranks(ranks, (str(tmp_path),), 4)
