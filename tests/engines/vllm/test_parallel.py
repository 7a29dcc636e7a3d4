"""Two ranks, each in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .engine import addresses, digest, reload, start, stop, tokens  # skips without vLLM


@pytest.fixture(scope="module")
def pair(moe: tuple[Path, Path]) -> Iterator[Any]:
    """An engine of A with experts divided by expert parallelism, all else by tensor parallelism."""
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    patch.setenv("ALIASPARAM_NVFP4_POLICY", "staged-journal")
    patch.setenv("ALIASPARAM_NVFP4_MOE_BACKEND", "flashinfer_cutlass")
    llm = start(moe[0], tensor_parallel_size=2, enable_expert_parallel=True, skip_tokenizer_init=True)
    yield llm
    stop(llm)
    patch.undo()


def test_law_9_on_two_ranks(pair: Any, moe: tuple[Path, Path]) -> None:
    before, fresh = addresses(pair), (digest(pair), tokens(pair))
    assert len(before) == 2 and fresh[0][0] != fresh[0][1]

    reload(pair, weights_path=str(moe[1]))
    assert not set(digest(pair)) & set(fresh[0]) and tokens(pair) != fresh[1]
    reload(pair, weights_path=str(moe[0]))
    assert (digest(pair), tokens(pair)) == fresh and addresses(pair) == before


def test_a_reset_refuses_and_a_whole_reload_heals_it(pair: Any, moe: tuple[Path, Path]) -> None:
    """Workers send the refusal as text, and the engine goes on. The reset's zeros can be told from what served."""
    before, a = addresses(pair), (digest(pair), tokens(pair))
    pair.collective_rpc("reset_weights")
    assert not set(digest(pair)) & set(a[0])
    assert tokens(pair) == [] and tokens(pair) == []
    reload(pair, weights_path=str(moe[0]))
    assert (digest(pair), tokens(pair)) == a and addresses(pair) == before


def breaks_on_the_second_rank(worker: Any, folder: str) -> None:
    from safetensors.torch import load_file

    def stream() -> Any:
        for number, item in enumerate(load_file(f"{folder}/model.safetensors").items()):
            if worker.rank == 1 and number == 40:
                raise ConnectionError("the second rank's stream broke")
            yield item

    worker.reload_weights(weights_iterator=stream())


def test_law_10_what_one_rank_cannot_no_rank_does(pair: Any, moe: tuple[Path, Path]) -> None:
    a = digest(pair), tokens(pair)

    with pytest.raises(Exception, match=r"another rank refused|stream broke"):
        pair.collective_rpc(breaks_on_the_second_rank, args=(str(moe[1]),))
    assert (digest(pair), tokens(pair)) == a
    reload(pair, weights_path=str(moe[1]))
    assert not set(digest(pair)) & set(a[0])
    reload(pair, weights_path=str(moe[0]))
    assert (digest(pair), tokens(pair)) == a


def move_experts(worker: Any, back: bool) -> bool:
    """vLLM's own rearrangement over both ranks, by a cycle of all experts: whether every name shows the experts that came."""
    from unittest import mock

    import torch
    from vllm.distributed.eplb.eplb_communicator import TorchDistGlooStagedEplbCommunicator
    from vllm.distributed.eplb.rebalance_execute import rearrange_expert_weights_inplace
    from vllm.distributed.parallel_state import get_ep_group

    model, group = worker.model_runner.get_model(), get_ep_group()
    layers = [m for m in model.modules() if hasattr(m, "w13_weight")]
    weights = [list(layer.get_expert_weights()) for layer in layers]
    names = [n for n, _ in layers[0].named_parameters() if "input_scale" not in n]
    ours = len(layers[0].w2_weight)

    def everyone(layer: Any) -> dict[str, Any]:
        parts: dict[str, Any] = {}
        for name in names:
            values = getattr(layer, name).clone().reshape(ours, -1).view(torch.uint8)
            gathered = [torch.empty_like(values) for _ in range(2)]
            torch.distributed.all_gather(gathered, values, group=group.cpu_group)
            parts[name] = torch.cat(gathered)
        return parts

    before = [everyone(layer) for layer in layers]
    old = torch.arange(2 * ours).expand(len(layers), -1).clone()
    new = old.roll(-3 if back else 3, 1)
    buffers = [torch.empty_like(w) for w in weights[0]]
    communicator = TorchDistGlooStagedEplbCommunicator(group.cpu_group)
    nothing_to_wait_for = mock.Mock()
    with mock.patch("torch.accelerator.current_stream", nothing_to_wait_for):
        rearrange_expert_weights_inplace(old, new, weights, buffers, group.device_group, communicator)
    return all(
        torch.equal(everyone(layer)[name], was[name][new[0]]) for layer, was in zip(layers, before, strict=True) for name in names
    )


def test_experts_move_between_ranks_in_kernel_order(pair: Any) -> None:
    llm, a = pair, (digest(pair), tokens(pair))
    assert llm.collective_rpc(move_experts, args=(False,)) == [True, True]
    assert tokens(llm) != a[1]  # the router does not know of it here
    assert llm.collective_rpc(move_experts, args=(True,)) == [True, True]
    assert (digest(llm), tokens(llm)) == a
