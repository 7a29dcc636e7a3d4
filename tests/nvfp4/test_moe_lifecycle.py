"""Loading experts the way engines do: what arrives, in which order, and what is computed from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from aliasparam import checkpoint_state_dict, process
from aliasparam.errors import StaleKernelError, StateError
from aliasparam_nvfp4 import COMPRESSED_TENSORS, MODELOPT
from aliasparam_nvfp4.moe.runners import moe_runner
from aliasparam_nvfp4.moe.scales import InputScales

from .moe_experts import RUNNERS, Dims, Experts, pointers, stored
from .moe_layers import SHAPES, choices, load, names

ALIGNED, RAGGED = SHAPES[0], SHAPES[2]
every_runner = pytest.mark.parametrize("runner", RUNNERS)


def loaded(runner: str, dims: Dims) -> Experts:
    layer = Experts(runner, dims)
    load(layer, stored(dims))
    return layer


@every_runner
@pytest.mark.parametrize("shard, suffix", [("w2", "input_scale"), ("w3", "input_scale"), ("w1", "weight_scale_2")])
def test_every_scalar_follows_each_of_its_sources(runner: str, shard: str, suffix: str) -> None:
    layer, tensors = loaded(runner, ALIGNED), stored(ALIGNED)
    changed = {k: t * (8 if suffix == "input_scale" else 2) for k, t in tensors.items() if k[1:] == (shard, suffix)}
    if suffix == "weight_scale_2":  # gate and up stay tied
        changed |= {(e, "w3", suffix): t for (e, _, _), t in changed.items()}
    load(layer, changed)
    oracle = Experts(runner, ALIGNED)
    load(oracle, tensors | changed)
    assert names(layer) == names(oracle)


@every_runner
def test_a_tensor_put_in_place_of_a_name_is_taken_into_its_storage(runner: str) -> None:
    """vLLM reloads into fresh parameters, transformers by setattr."""
    layer, tensors = loaded(runner, RAGGED), stored(RAGGED, 1)
    loaders = {n: p.weight_loader for n, p in layer.named_parameters()}
    before = pointers(layer)
    cold = Experts(runner, RAGGED)
    load(cold, tensors)
    for name, value in checkpoint_state_dict(cold).items():
        setattr(layer, name, nn.Parameter(value.clone(), requires_grad=False))
    process(layer)
    assert names(layer) == names(cold) and pointers(layer) == before
    assert {n: p.weight_loader for n, p in layer.named_parameters()} == loaders
    load(layer, stored(RAGGED))
    assert names(layer) == names(loaded(runner, RAGGED))


@every_runner
def test_the_loader_keeps_no_tensor_whose_buffer_the_transport_uses_again(runner: str) -> None:
    layer, tensors = Experts(runner, ALIGNED), {k: t.clone() for k, t in stored(ALIGNED).items()}
    load(layer, tensors, process=False)
    for tensor in tensors.values():
        tensor.view(torch.uint8).zero_() if tensor.dim() else tensor.zero_()
    process(layer)
    assert names(layer) == names(loaded(runner, ALIGNED))


@every_runner
def test_scalars_are_not_computed_from_the_shards_that_happen_to_be_there(runner: str) -> None:
    layer, tensors = Experts(runner, ALIGNED), stored(ALIGNED)
    late = {k: t for k, t in tensors.items() if k[1:] == ("w3", "weight_scale_2")}
    with pytest.raises(StateError, match="w13_weight_scale_2"):
        load(layer, {k: t for k, t in tensors.items() if k not in late})
    with pytest.raises(StaleKernelError):
        layer(*choices(2, *ALIGNED[:2]))
    load(layer, late)
    assert names(layer) == names(loaded(runner, ALIGNED))


@pytest.mark.parametrize("how", [{}, {"checkpoint": COMPRESSED_TENSORS}], ids=["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("runner", [n for n in RUNNERS if moe_runner(n).input_scales is InputScales.ONE])
def test_ranks_reduce_input_scales_over_all_experts_alike(runner: str, how: dict[str, Any]) -> None:
    e, h, i = 4, 128, 64
    tensors = stored((e, h, i), fmt=how.get("checkpoint", MODELOPT))
    found = []
    for rank in range(2):
        layer = Experts(runner, (e // 2, h, i), ep_rank=rank, ep_size=2, **how)
        for seed in (1, 0):
            load(layer, stored((e, h, i), seed, fmt=layer.method.checkpoint))
        load(layer, {k: t for k, t in tensors.items() if k[0] // 2 == rank})  # only its own come again
        found.append({n: layer.get_buffer(n).tolist() for n in ("w13_input_scale_quant", "w2_input_scale_quant")})
    assert found[0] == found[1]
