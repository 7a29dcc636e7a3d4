"""What each of the three engines does to a layer while loading and reloading, step by step, on a declared layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aliasparam import Alias, Derivation, declare, process

from .small import SWAP_PAD16, kernel

TRANSFORM = SWAP_PAD16


def make(device: str = "cpu") -> Any:
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.empty(8, 6, dtype=torch.uint8, device=device), requires_grad=False)
    layer.scale = nn.Parameter(torch.empty(3, device=device), requires_grad=False)
    layer.weight.weight_loader = print
    declare(
        layer,
        Alias("weight", "prepared", TRANSFORM),
        Derivation("alpha", ("scale",), lambda s: s.max().reshape(1), (1,), torch.float32),
        loaded=False,
    )
    return layer


def checkpoint(add: int) -> dict[str, Tensor]:
    return {"weight": torch.arange(48, dtype=torch.uint8).view(8, 6) + add, "scale": torch.tensor([1.0, 2.0, 3.0]) + add}


def assert_serves(layer: Any, add: int) -> None:
    values = checkpoint(add)
    assert torch.equal(layer.prepared, kernel(TRANSFORM, values["weight"]))
    assert torch.equal(layer.alpha, values["scale"].max().reshape(1))
    with pytest.raises(NotImplementedError):  # nn.Module's own forward: the guard let it through
        layer()


def addresses(layer: nn.Module) -> dict[str, int]:
    return {n: t.data_ptr() for n, t in (*layer.named_parameters(), *layer.named_buffers())}


def test_transformers_builds_on_meta_replaces_every_parameter_and_processes_once() -> None:
    layer = make("meta")
    for name, value in checkpoint(0).items():
        setattr(layer, name, nn.Parameter(value.clone(), requires_grad=value.is_floating_point()))
    process(layer)
    before = addresses(layer)
    assert_serves(layer, 0)

    layer.load_state_dict(checkpoint(7))  # its only way to reload
    process(layer)

    assert_serves(layer, 7)
    assert addresses(layer) == before
    assert not any(p.requires_grad for p in layer.parameters())


def test_sglang_refills_in_place_and_processes_modules_that_got_nothing() -> None:
    layers = nn.ModuleList([make(), make()])
    for layer in layers:
        for name, value in checkpoint(0).items():
            layer.get_parameter(name).data.copy_(value)
    process(layers)
    before = addresses(layers)

    for add in (9, 4):
        for name, value in checkpoint(add).items():
            layers[0].get_parameter(name).data.copy_(value)
        process(layers)
        process(layers)
        assert_serves(layers[0], add)
        assert_serves(layers[1], 0)
    assert addresses(layers) == before


@pytest.mark.parametrize("whole", [True, False])
def test_vllm_puts_fresh_tensors_in_place_and_copies_the_results_into_the_old(whole: bool) -> None:
    layer = make()
    for name, value in checkpoint(0).items():
        layer.get_parameter(name).data.copy_(value)
    process(layer)
    before = addresses(layer)

    for add in (9, 4):
        kept = (dict(layer._parameters), dict(layer._buffers))
        for group in (layer._parameters, layer._buffers):  # everything to the meta device, as it was before loading
            for name, tensor in list(group.items()):
                empty = torch.empty_like(tensor, device="meta")
                group[name] = nn.Parameter(empty, requires_grad=False) if group is layer._parameters else empty
        values = checkpoint(add)
        if whole:  # materialized, loaded, processed
            for name, value in values.items():
                layer._parameters[name] = nn.Parameter(torch.empty_like(value), requires_grad=False)
                layer._parameters[name].data.copy_(value)
            for name, buffer in list(layer._buffers.items()):
                layer._buffers[name] = torch.empty_like(buffer, device="cpu")
            process(layer)
        current = (dict(layer._parameters), dict(layer._buffers))
        for old, new, group in zip(kept, current, (layer._parameters, layer._buffers), strict=True):
            for name, tensor in old.items():
                if whole:
                    tensor.data.copy_(new[name])
                group[name] = tensor
        assert_serves(layer, add if whole else 0)
        assert process(layer) == 0
        assert addresses(layer) == before
    assert layer.weight.weight_loader is print
