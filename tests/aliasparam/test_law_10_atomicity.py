"""Law 10: a failure anywhere leaves old, new, or a refusal; and a refused operation touches nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aliasparam._dispatch as dispatch
from aliasparam import (
    Alias,
    InterleaveHalves,
    State,
    SwapHalves,
    declare,
    process,
)
from aliasparam._writes import write_one
from aliasparam.errors import StaleKernelError, StateError

from .small import Fails, Layer, counting, is_ready, storage_of, the_registry

LARGE = (64, 1 << 18)  # converts in several pieces


def needs_a_load(layer: Layer) -> None:
    """Everything refuses until the weight is loaded whole, and then it serves."""
    assert storage_of(layer).state is State.INVALID
    assert not is_ready(layer)
    with pytest.raises(StaleKernelError):
        layer()
    with pytest.raises(StateError):
        _ = layer.weight + 0
    with pytest.raises(StateError):
        process(layer)
    layer.weight.fill_(3)
    process(layer)
    assert layer().unique().tolist() == [3]


# -- conversions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_law_10_a_conversion_that_fails_midway_leaves_a_refusal(error: BaseException) -> None:
    transform = Fails()
    layer = Layer(LARGE, transform)

    with transform.failing(3, error), pytest.raises(type(error)):
        process(layer)

    needs_a_load(layer)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_law_10_a_write_whose_conversion_fails_midway_leaves_a_refusal(error: BaseException) -> None:
    transform = Fails()
    layer = Layer(LARGE, transform)
    process(layer)

    with transform.failing(3, error), pytest.raises(type(error)):
        layer.weight[0] = 1

    needs_a_load(layer)


def test_law_10_a_conversion_that_fails_before_it_wrote_changes_nothing() -> None:
    transform = Fails()
    layer = Layer((6, 8), transform)

    with transform.failing(1), pytest.raises(RuntimeError):
        process(layer)
    assert torch.equal(layer.weight, counting(6, 8))
    process(layer)
    with transform.failing(1), pytest.raises(RuntimeError):
        layer.weight[0] = 1

    assert is_ready(layer)
    assert torch.equal(layer(), SwapHalves().forward(counting(6, 8)))


def test_law_10_a_retarget_that_fails_leaves_a_module_that_refuses_and_recovers() -> None:
    transform = Fails()
    module: Any = nn.Module()
    module.a = nn.Parameter(counting(4, 2), requires_grad=False)
    module.b = nn.Parameter(counting(4, 2), requires_grad=False)
    module.forward = lambda: (module.ak.clone(), module.bk.clone())
    declare(module, Alias("a", "ak", SwapHalves()), Alias("b", "bk", transform))
    process(module)

    with transform.failing(1), pytest.raises(RuntimeError):
        the_registry(module).retarget({"a": InterleaveHalves(), "b": InterleaveHalves()})

    with pytest.raises(StaleKernelError):
        module()
    process(module)
    assert torch.equal(module()[0], SwapHalves().forward(counting(4, 2))), "neither or both are retargeted"
    assert torch.equal(module()[1], SwapHalves().forward(counting(4, 2)))


# -- writes that fail --------------------------------------------------------------------------------------------------


def test_law_10_a_failed_write_of_several_tensors_leaves_a_refusal() -> None:
    a, b = Layer(), Layer()
    process(a)
    process(b)

    with pytest.raises(RuntimeError):
        torch._foreach_copy_(
            [a.weight, b.weight], [torch.full((6, 8), 9, dtype=torch.uint8), torch.zeros(5, 7, dtype=torch.uint8)]
        )

    needs_a_load(a)
    needs_a_load(b)


def test_law_10_an_operator_that_may_fail_after_writing_leaves_a_refusal() -> None:
    layer = Layer()
    process(layer)

    with pytest.raises((IndexError, RuntimeError)):
        layer.weight.index_copy_(0, torch.tensor([0, 99]), torch.full((2, 8), 9, dtype=torch.uint8))

    needs_a_load(layer)


@pytest.mark.parametrize("operation", ["copy_", "add_", "masked_fill_"])
def test_law_10_an_operator_that_checks_before_it_writes_changes_nothing(operation: str) -> None:
    layer = Layer()
    process(layer)
    wrong: Any = torch.zeros(5, 7, dtype=torch.uint8)

    with pytest.raises(RuntimeError):
        if operation == "masked_fill_":
            layer.weight.masked_fill_(wrong.bool(), 1)
        else:
            getattr(layer.weight, operation)(wrong)

    assert is_ready(layer)
    assert torch.equal(layer(), SwapHalves().forward(counting(6, 8)))


def test_law_10_an_interrupt_after_the_bytes_were_written_leaves_a_refusal() -> None:
    layer = Layer()
    process(layer)

    def interrupted(memory: Tensor, *args: Any) -> None:
        memory[:3].fill_(9)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_one(interrupted, layer.weight, (), True)

    needs_a_load(layer)


class DyingAllGather:
    """A collective whose peer dies when ten bytes have arrived."""

    real = torch.ops.c10d._allgather_base_.default
    _schema, tags = real._schema, real.tags

    def __call__(self, **given: Any) -> None:
        given["output_tensor"].view(-1)[:10].fill_(222)
        raise RuntimeError("peer died")


def test_law_10_a_collective_that_fails_midway_leaves_a_refusal() -> None:
    layer = Layer()
    process(layer)
    operator: Any = DyingAllGather()

    with pytest.raises(RuntimeError, match="peer died"):
        dispatch._handler_for(operator)(operator, (layer.weight.data, torch.zeros(6, 8, dtype=torch.uint8), None), {})

    needs_a_load(layer)
