"""Tensor and expert parallelism by real processes over gloo, across a reload."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from .moe_layers import MoE, checkpoint, choices, load

E, H, I = 4, 128, 256  # noqa: E741


def ranks(rank: int, folder: str, size: int, how: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    try:
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
            dist.all_reduce(out)
            torch.testing.assert_close(out, whole(x, weights, ids), rtol=1e-4, atol=1e-5)
            answers.append(out)
        assert torch.equal(answers[0], answers[2]), "A again is A"
        assert not torch.equal(answers[0], answers[1])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("how, size", [("tp", 2), ("tp", 4), ("ep", 2), ("ep", 4)])
def test_ranks_give_the_result_of_one_process(how: str, size: int, tmp_path: Path) -> None:
    mp.spawn(ranks, args=(str(tmp_path), size, how), nprocs=size)
