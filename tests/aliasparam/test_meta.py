"""Declared on the meta device: a plan without memory, bound to whatever a loader puts there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from aliasparam import Alias, AliasedParameter, declare, memory_report, process
from aliasparam.errors import DeclarationError

from .small import PAD8, SWAP


def test_a_plan_costs_no_memory_and_is_bound_by_the_loader() -> None:
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.empty(6, 8, dtype=torch.uint8, device="meta"), requires_grad=False)
    declare(layer, Alias("weight", "prepared", PAD8), loaded=False)

    assert memory_report(layer).allocated_bytes == 64
    assert list(layer.named_buffers()) == []

    values = torch.arange(48, dtype=torch.uint8).view(6, 8)
    layer.weight = nn.Parameter(values.clone(), requires_grad=False)  # what transformers' loader does
    process(layer)

    assert isinstance(layer.weight, AliasedParameter)
    assert layer.weight.data_ptr() == layer.prepared.data_ptr()
    assert torch.equal(layer.weight, values)


def meta_layer(layout: str) -> nn.Module:
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.empty(6, 8, dtype=torch.uint8, device="meta"), requires_grad=False)
    declare(layer, Alias("weight", "prepared", layout), loaded=False)
    return layer


def test_law_1_a_tie_that_a_loader_makes_is_a_tie_also_between_processings() -> None:
    first, second = meta_layer(SWAP), meta_layer(SWAP)
    first.weight = nn.Parameter(torch.arange(48, dtype=torch.uint8).view(6, 8), requires_grad=False)
    process(first)

    second.weight = first.weight  # as transformers' tie_weights()
    process(second)
    assert second.weight is first.weight and second.prepared.data_ptr() == first.prepared.data_ptr()

    second.weight.fill_(7)
    process(first)
    assert first.prepared.unique().tolist() == [7]

    other = meta_layer(PAD8)
    other.weight = first.weight
    with pytest.raises(DeclarationError, match="two different kernel formats"):
        process(other)


def test_law_1_two_names_of_one_module_that_a_loader_ties_are_one_storage_or_refused() -> None:
    for layout in (SWAP, PAD8):
        layer = meta_layer(SWAP)
        layer.head = nn.Parameter(torch.empty(6, 8, dtype=torch.uint8, device="meta"), requires_grad=False)
        declare(layer, Alias("head", "head_prepared", layout), loaded=False)
        layer.weight = layer.head = nn.Parameter(torch.arange(48, dtype=torch.uint8).view(6, 8), requires_grad=False)
        if layout == PAD8:
            for _ in range(2):
                with pytest.raises(DeclarationError, match="two different kernel formats"):
                    process(layer)
            continue
        process(layer)
        layer.head.fill_(7)
        process(layer)
        assert layer.prepared.unique().tolist() == layer.head_prepared.unique().tolist() == layer.weight.unique().tolist() == [7]


def test_float_scales_that_come_back_with_requires_grad_are_taken() -> None:
    layer = nn.Module()
    layer.scale = nn.Parameter(torch.empty(3, device="meta"), requires_grad=False)
    declare(layer, Alias("scale", "prepared"), loaded=False)

    layer.scale = nn.Parameter(torch.ones(3))  # requires_grad=True
    process(layer)

    assert not layer.scale.requires_grad
    assert torch.equal(layer.prepared, torch.ones(3))


def test_declaring_under_a_meta_device_context_keeps_real_index_tables() -> None:
    """Engines build modules inside `with torch.device(...)`; the tables of a row count are shared with real modules."""
    for device in ("meta", "cpu"):
        with torch.device(device):
            layer = nn.Module()
            layer.weight = nn.Parameter(torch.ones(74, 4, dtype=torch.uint8), requires_grad=False)
            declare(layer, Alias("weight", "prepared", SWAP))
    assert process(layer) and torch.equal(layer.prepared, torch.ones(74, 4, dtype=torch.uint8, device="cpu"))
