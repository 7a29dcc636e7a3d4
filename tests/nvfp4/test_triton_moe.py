"""The Triton experts against exact math: on a GPU as they are, on the CPU in Triton's interpreter (in a process of its own)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aliasparam_nvfp4.linear.verify import signal_to_noise

from .interpreter import interpreted
from .moe_layers import SHAPES, MoE, checkpoint, choices, dense, load

pytest.importorskip("triton")
#: Tokens; with few experts 40 fill several tiles, and 1 leaves experts without any.
TOKENS = (1, 5, 40)
#: (T, k, experts of all ranks, first expert and experts of this rank, slots a tile).
ROUTINGS = [
    (1, 1, 1, 0, 1, 8),
    (1, 8, 384, 0, 384, 8),
    (8, 8, 32, 0, 32, 8),
    (5, 3, 7, 2, 3, 4),
    (100, 8, 64, 16, 32, 16),
    (128, 8, 8, 0, 8, 64),
]


def routed(tokens: int, k: int, experts: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(experts, generator=random)[:k] for _ in range(tokens)]).int()


def check_experts(dims: tuple[int, int, int], tokens: int, dtype: torch.dtype, device: str) -> None:
    """Rounding to ``dtype`` happens twice, for the hidden rows and the result; sums are float32."""
    tensors = checkpoint(*dims, untied=True)
    with torch.device(device):
        layer = MoE("triton", *dims)
    load(layer, {key: tensor.to(device) for key, tensor in tensors.items()})
    x, weights, ids = choices(tokens, *dims[:2])
    x = x.to(dtype)
    found = layer(x.to(device), weights.to(device), ids.to(device)).cpu()
    assert found.dtype is dtype
    least = 40 if dtype is torch.bfloat16 else 58
    decibel = signal_to_noise(found.double(), dense(tensors, x, weights, ids))
    assert decibel > least, (dims, tokens, dtype, decibel)


def check_plan(tokens: int, k: int, everywhere: int, first: int, experts: int, tile: int, device: str) -> None:
    from aliasparam_nvfp4.kernels.plan import by_sorting, plan

    ids = routed(tokens, k, everywhere)
    made = plan(ids.to(device), experts=experts, first_expert=first, tile=tile)
    assert torch.equal(made.table.cpu(), by_sorting(ids.reshape(-1), experts, first, tile, made.tiles))


@pytest.mark.parametrize("tokens, k, everywhere, first, experts, tile", ROUTINGS)
def test_every_slot_of_this_rank_is_in_one_tile_of_its_expert(
    tokens: int, k: int, everywhere: int, first: int, experts: int, tile: int
) -> None:
    from aliasparam_nvfp4.kernels.plan import plan

    ids = routed(tokens, k, everywhere)
    made = plan(ids, experts=experts, first_expert=first, tile=tile)
    entries, order = made.table[: 3 * made.tiles].view(-1, 3).tolist(), made.table[3 * made.tiles :].tolist()
    placed = []
    for expert, begin, count in entries:
        assert count <= tile
        slots = order[begin : begin + count] if expert >= 0 else []
        assert all(int(ids.reshape(-1)[slot]) == first + expert for slot in slots)
        placed += slots
    assert sorted(order) == list(range(tokens * k))
    assert sorted(placed) == [s for s, e in enumerate(ids.reshape(-1).tolist()) if first <= e < first + experts]


def test_a_padded_token_that_names_one_expert_many_times_has_room() -> None:
    from aliasparam_nvfp4.kernels.plan import plan

    made = plan(torch.zeros(16, 8, dtype=torch.int32), experts=8, first_expert=0, tile=8)
    assert int(made.table[: 3 * made.tiles].view(-1, 3)[:, 2].sum()) == 16 * 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [*TOKENS, 200])
@pytest.mark.parametrize("dims", [*SHAPES, (32, 2048, 768)], ids=str)
def test_experts_are_exact_but_for_two_roundings(dims: tuple[int, int, int], tokens: int, dtype: torch.dtype) -> None:
    check_experts(dims, tokens, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_plan_is_that_of_sorting(routing: tuple[int, int, int, int, int, int]) -> None:
    check_plan(*routing, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_a_captured_graph_follows_other_choices_and_other_weights() -> None:
    dims = (8, 512, 256)
    with torch.device("cuda"):
        layer = MoE("triton", *dims)
    a, b = ({key: t.cuda() for key, t in checkpoint(*dims, seed).items()} for seed in (0, 1))
    load(layer, a)
    x, weights, ids = (t.cuda() for t in choices(4, *dims[:2]))
    x = x.bfloat16()
    layer(x, weights, ids)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x, weights, ids)
    for tensors, others in ((a, ids), (a, (ids + 3) % 8), (b, ids), (a, ids)):
        load(layer, tensors)
        static = ids.clone()
        ids.copy_(others)
        graph.replay()
        expected = layer(x, weights, ids)
        assert torch.equal(out, expected)
        ids.copy_(static)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run here")
def test_the_experts_in_the_interpreter() -> None:
    assert interpreted("tests.nvfp4.test_triton_moe").count("right") == len(SHAPES) * len(TOKENS) + 2 + len(ROUTINGS)


if __name__ == "__main__":
    for shape in SHAPES:
        for count in TOKENS:
            check_experts(shape, count, torch.bfloat16, "cpu")
            print("right", shape, count)
    check_experts(SHAPES[2], 5, torch.float16, "cpu")
    print("right in float16")
    from aliasparam_nvfp4.kernels import triton_moe

    triton_moe._SLOTS_AT_ONCE = 6  # 40 tokens of 2 choices: 13 pieces of 3 tokens, and one more
    check_experts(SHAPES[2], 40, torch.bfloat16, "cpu")
    print("right in pieces")
    for one in ROUTINGS:
        check_plan(*one, device="cpu")
        print("right", one)
