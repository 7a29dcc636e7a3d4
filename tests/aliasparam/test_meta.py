"""Declared on the meta device: a plan without memory, bound to whatever a loader puts there."""

from __future__ import annotations

import torch
from torch import nn

from aliasparam import Alias, AliasedParameter, declare, memory_report, process

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
