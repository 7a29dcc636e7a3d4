"""Law 10 for what is refused: it touches nothing else; and for exposures and bulk loads that fail."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from aliasparam import (
    Alias,
    InterleaveHalves,
    State,
    SwapHalves,
    alias_or_bind_derived_param,
    bulk_load,
    declare,
    expose_for_writing,
    process,
    registry_of,
)
from aliasparam.errors import DeclarationError, StateError

from .small import Fails, Layer, counting, is_ready, storage_of, the_registry

# -- refused operations ------------------------------------------------------------------------------------------------


def test_law_10_a_refused_bulk_load_loses_no_other_tensor() -> None:
    a, b = Layer(), Layer()
    model = nn.ModuleList([a, b])
    process(model)
    exposure = expose_for_writing(b, "weight")

    with pytest.raises(StateError, match="exposed"), bulk_load(model):
        pass
    exposure.written()
    process(model)

    assert torch.equal(a(), SwapHalves().forward(counting(6, 8)))


def test_law_10_a_bulk_load_that_cannot_open_all_loses_nothing() -> None:
    transform = Fails()
    a, b = Layer(), Layer((6, 8), transform)
    empty = Layer(loaded=False)
    model = nn.ModuleList([a, empty, b])
    process(a)
    process(b)

    with transform.failing(1), pytest.raises(RuntimeError), bulk_load(model):
        pass

    assert storage_of(empty).state is State.EMPTY
    for layer in (a, b):
        process(layer)
        assert torch.equal(layer(), SwapHalves().forward(counting(6, 8)))


def test_law_10_a_refused_foreach_loses_no_other_tensor() -> None:
    a, b = Layer(), Layer()
    process(a)
    process(b)
    exposure = expose_for_writing(b, "weight")
    new = torch.zeros(6, 8, dtype=torch.uint8)

    with pytest.raises(StateError, match="exposed"):
        torch._foreach_copy_([a.weight, b.weight], [new, new])
    exposure.abandon()

    assert is_ready(a)
    assert torch.equal(a.weight, counting(6, 8))
    assert torch.equal(a(), SwapHalves().forward(counting(6, 8)))


# -- exposures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["an exposure", "a bulk load"])
def test_law_10_rows_written_before_a_failed_load_must_arrive_again(failing: str) -> None:
    layer = Layer(loaded=False)
    layer.weight[:3] = 1
    if failing == "an exposure":
        exposure = expose_for_writing(layer, "weight")
        exposure.memory.fill_(99)
        exposure.abandon()
    else:
        with pytest.raises(ZeroDivisionError), bulk_load(layer):
            layer.weight.data.fill_(99)
            _ = 1 / 0

    layer.weight[3:] = 1
    with pytest.raises(StateError):
        process(layer)
    layer.weight[:3] = 1
    process(layer)

    assert layer().unique().tolist() == [1]


def test_law_10_areas_written_long_ago_do_not_count_when_a_region_is_begun_again() -> None:
    layer = Layer((2, 6, 8), loaded=False)
    layer.weight[0, :3] = 1
    layer.weight[0, 3:] = 1
    storage = storage_of(layer)
    storage.settle()
    assert storage.states == [State.CHECKPOINT, State.EMPTY]
    exposure = expose_for_writing(layer, "weight", slice(0, 1))
    exposure.abandon()

    layer.weight[0, :3] = 2
    layer.weight[1] = 2

    with pytest.raises(StateError):
        process(layer)


def test_law_10_a_format_is_not_changed_while_somebody_writes_the_bytes() -> None:
    layer = Layer()

    with expose_for_writing(layer, "weight"), pytest.raises(StateError, match="exposed"):
        the_registry(layer).retarget({"weight": InterleaveHalves()})

    process(layer)
    assert torch.equal(layer(), SwapHalves().forward(counting(6, 8)))


@pytest.mark.parametrize("by", ["deepcopy", "save"])
@pytest.mark.parametrize("through", ["an exposure", "a bulk load"])
def test_law_10_a_module_is_not_copied_while_somebody_writes_it(by: str, through: str) -> None:
    layer = Layer()
    writing: Any = bulk_load(layer) if through == "a bulk load" else expose_for_writing(layer, "weight")

    with writing, pytest.raises(StateError, match="exposed"):
        copy.deepcopy(layer) if by == "deepcopy" else torch.save(layer, io.BytesIO())

    assert torch.equal(copy.deepcopy(layer).weight, counting(6, 8))


def test_law_10_rows_of_kernel_bytes_without_an_inverse_are_not_exposed() -> None:
    module: Any = nn.Module()
    module.w = nn.Parameter(counting(4, 3), requires_grad=False)
    alias_or_bind_derived_param(module, "w", "d", module.w.flip(0))

    with pytest.raises(StateError, match="undeclared transform"):
        expose_for_writing(module, "w", slice(0, 2))

    assert torch.equal(module.d, counting(4, 3).flip(0)), "a refused exposure changes nothing"
    with expose_for_writing(module, "w") as exposure:
        exposure.memory.fill_(1)
    assert module.w.unique().tolist() == [1]


# -- declarations ------------------------------------------------------------------------------------------------------


def test_law_10_a_declaration_refused_for_a_tie_changes_nothing() -> None:
    a, b = nn.Module(), nn.Module()
    a.w = b.w = nn.Parameter(counting(4, 2), requires_grad=False)
    b.v = nn.Parameter(counting(4, 2), requires_grad=False)
    declare(a, Alias("w", "k", SwapHalves()))

    with pytest.raises(DeclarationError, match="two different kernel formats"):
        declare(b, Alias("v", "vk", SwapHalves()), Alias("w", "k", InterleaveHalves()))

    assert type(b.v) is nn.Parameter
    assert registry_of(b) is None
