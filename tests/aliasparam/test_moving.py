"""Modules and parameters that go to another device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from aliasparam import AliasedParameter, process

from .small import SWAP, kernel, layer_of

VALUES = torch.arange(48, dtype=torch.uint8).view(6, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_moving_the_module_to_another_device_keeps_it_right() -> None:
    layer = layer_of(VALUES)
    process(layer)

    layer.cuda()
    process(layer)

    assert layer.weight.is_cuda and layer.prepared.is_cuda
    assert layer.weight.data_ptr() == layer.prepared.data_ptr()
    assert torch.equal(layer.weight.cpu(), VALUES)
    assert torch.equal(layer.prepared.cpu(), kernel(SWAP, VALUES))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_parameters_replaced_by_ones_on_another_device_are_followed() -> None:
    layer = layer_of(VALUES)
    process(layer)

    layer.weight = nn.Parameter(VALUES.cuda() + 1, requires_grad=False)
    process(layer)

    assert isinstance(layer.weight, AliasedParameter)
    assert layer.weight.data_ptr() == layer.prepared.data_ptr()
    assert torch.equal(layer.prepared.cpu(), kernel(SWAP, VALUES + 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("changed", ["nothing", "the copy", "the name", "other values"])
def test_law_1_data_of_another_device_is_taken_with_its_values(changed: str) -> None:
    """What Module.to() assigns is a copy of what is there, and no news: whoever derived from it need not again."""
    layer = layer_of(VALUES)
    process(layer)
    storage = layer.weight._alias_storage
    before, moved = storage.version, layer.weight.cuda()

    if changed == "the copy":
        moved += 1
    elif changed == "the name":
        layer.weight.fill_(7)
    layer.weight.data = VALUES.cuda() + 1 if changed == "other values" else moved
    process(layer)

    assert torch.equal(layer.weight.cpu(), VALUES + (changed in ("the copy", "other values")))
    assert torch.equal(layer.prepared.cpu(), kernel(SWAP, layer.weight.cpu()))
    assert (storage.version == before) is (changed == "nothing")
