"""Routed experts beside the shared expert's linear layers and beside layers of other kinds, in one model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from aliasparam import checkpoint_state_dict, memory_report, reload
from aliasparam.errors import ReloadError, StaleKernelError
from aliasparam_nvfp4 import NvFp4LinearMethod

from .moe_experts import Dims, Experts, pointers, rows_of, stored
from .moe_layers import SHAPES, choices, load, names


class Block(nn.Module):
    """Routed experts, a shared expert of plain linear layers, and a layer that is no concern of ours."""

    def __init__(self, runner: str, linear: str, dims: Dims) -> None:
        super().__init__()
        self.experts = Experts(runner, dims)
        self.shared = nn.ModuleDict({"gate_up": nn.Module(), "down": nn.Module()})
        self.linear_method = NvFp4LinearMethod(linear)
        _, h, i = dims
        self.linear_method.create_weights(self.shared["gate_up"], h, [i, i], h, 2 * i, torch.bfloat16)
        self.linear_method.create_weights(self.shared["down"], i, [h], i, h, torch.bfloat16)
        self.fp8 = nn.Linear(32, 32, bias=False)
        self.fp8.weight = nn.Parameter(torch.ones(32, 32).to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        gate, up = self.linear_method.apply(self.shared["gate_up"], x).chunk(2, -1)
        shared = self.linear_method.apply(self.shared["down"], nn.functional.silu(gate) * up)
        return shared + self.experts(x, weights, ids)


def block_tensors(block: Block, dims: Dims, seed: int) -> dict[str, Tensor]:
    layer = Experts("reference", dims)
    load(layer, stored(dims, seed))
    tensors = {f"experts.{n}": t.clone() for n, t in checkpoint_state_dict(layer).items()}
    first = stored((1, *dims[1:]), seed + 5)
    for suffix in ("weight", "weight_scale"):
        tensors[f"shared.gate_up.{suffix}"] = rows_of(first, 0, "w13", suffix)
        tensors[f"shared.down.{suffix}"] = first[0, "w2", suffix]
    for suffix in ("weight_scale_2", "input_scale"):
        tensors[f"shared.gate_up.{suffix}"] = first[0, "w1", suffix].expand(2).clone()
        tensors[f"shared.down.{suffix}"] = first[0, "w2", suffix].reshape(1)
    tensors["fp8.weight"] = (torch.ones(32, 32) * (seed + 1)).to(torch.float8_e4m3fn)
    return tensors


@pytest.mark.parametrize("runner, linear", [("reference", "reference"), ("flashinfer_cutlass", "flashinfer_cutlass")])
def test_routed_and_shared_experts_reload_together_in_one_transaction(runner: str, linear: str) -> None:
    dims = SHAPES[1]
    block, cold = Block(runner, linear, dims), Block(runner, linear, dims)
    tensors = {seed: block_tensors(block, dims, seed) for seed in (0, 1)}
    with reload(block) as session:
        session.load(tensors[0])
    addresses, answers = pointers(block), []
    for seed in (1, 0, 1):
        with reload(block) as session:
            session.load(tensors[seed])
        if runner == "reference":
            answers.append(block(*choices(3, *dims[:2])))
    with reload(cold) as session:
        session.load(tensors[1])
    assert names(block) == names(cold) and pointers(block) == addresses
    if answers:
        assert torch.equal(answers[0], answers[2]) and not torch.equal(answers[0], answers[1])
    assert not [row for row in memory_report(block).rows if row.module == "fp8"]
    with pytest.raises(ReloadError), reload(block) as session:
        session.load({n: t for n, t in tensors[0].items() if n != "experts.w2_weight"})
    with pytest.raises(StaleKernelError):
        if runner == "reference":
            block(*choices(3, *dims[:2]))
        block.get_buffer("experts.w13_weight_prepared").clone()
