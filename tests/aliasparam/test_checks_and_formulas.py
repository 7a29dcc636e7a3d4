"""What an author may add to a registry: checks before processing, and other formulas for derived names."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from aliasparam import Alias, AliasRegistry, Derivation, declare
from aliasparam.errors import DeclarationError, StaleKernelError
from aliasparam.module.derive import value_of

from .small import SWAP


def test_a_name_gets_another_formula_of_the_same_shape_only() -> None:
    module = nn.Module()
    module.scale = nn.Parameter(torch.tensor([2.0, 3.0]), requires_grad=False)
    f32 = torch.float32
    registry = declare(module, Derivation("twice", ("scale",), lambda s: 2 * s, (2,), f32))
    registry.process()
    address = module.twice.data_ptr()
    for wrong in (
        Derivation("other", ("scale",), torch.clone, (2,), f32),
        Derivation("twice", ("scale",), torch.clone, (1,), f32),
        Derivation("twice", ("nothing",), torch.clone, (2,), f32),
    ):
        with pytest.raises(DeclarationError):
            registry.rederive([wrong])
    registry.process()
    assert module.twice.tolist() == [4.0, 6.0]
    registry.rederive([Derivation("twice", ("scale",), lambda s: 3 * s, (2,), f32)])
    assert not registry.is_ready
    registry.process()
    assert module.twice.tolist() == [6.0, 9.0] and module.twice.data_ptr() == address


def test_other_formulas_may_derive_from_each_other_and_are_computed_in_order() -> None:
    module, f32 = nn.Module(), torch.float32
    module.scale = nn.Parameter(torch.tensor([2.0]), requires_grad=False)
    registry = declare(module, *(Derivation(name, ("scale",), torch.clone, (1,), f32) for name in "abc"))
    registry.process()
    chain = [Derivation("a", ("b",), lambda b: b + 1, (1,), f32), Derivation("b", ("c", "scale"), torch.mul, (1,), f32)]
    with pytest.raises(DeclarationError, match="cycle"):
        registry.rederive([*chain, Derivation("c", ("a",), torch.clone, (1,), f32)])
    assert registry.is_ready
    registry.rederive(chain)

    for scale in (2.0, 3.0):
        registry.process()
        assert (module.a.item(), module.b.item(), module.c.item()) == (scale * scale + 1, scale * scale, scale)
        module.scale.fill_(3)
    registry.process()


def refuse(registry: AliasRegistry) -> None:
    if registry.module.weight[0, 0] == 13:
        raise ValueError("unlucky")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(8.0).view(4, 2), requires_grad=False)
        total = Derivation("total", ("weight",), lambda w: w.sum().reshape(1), (1,), torch.float32)
        declare(self, Alias("weight", "prepared", SWAP), total, checks=[refuse])

    def forward(self) -> torch.Tensor:
        return self.get_buffer("prepared")


def test_a_check_that_raises_leaves_everything_as_it_was_and_the_layer_refuses() -> None:
    layer = Layer()
    registry = layer._alias_registry
    registry.process()
    before = layer.get_buffer("total").clone()
    layer.weight[0, 0] = 13
    for _ in range(2):
        with pytest.raises(ValueError, match="unlucky"):
            registry.process()
        assert torch.equal(value_of(registry, "total"), before) and layer.weight[0, 0] == 13
        with pytest.raises(StaleKernelError):
            layer()
    layer.weight[0, 0] = 5
    registry.process()
    assert layer()[2, 0] == 5 and layer.get_buffer("total") == before + 5


def test_a_copied_layer_keeps_its_checks() -> None:
    layer = copy.deepcopy(Layer())
    assert layer._alias_registry.checks == [refuse]
    layer.weight[0, 0] = 13
    with pytest.raises(ValueError, match="unlucky"):
        layer._alias_registry.process()
