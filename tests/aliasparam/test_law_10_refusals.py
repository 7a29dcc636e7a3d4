"""Law 10: what is refused, or fails midway, has written nothing; raw memory that a writer left in pieces."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aliasparam import Alias, State, declare, expose_for_writing, process, registry_of
from aliasparam.errors import DeclarationError, StaleKernelError, StateError
from aliasparam.module.derive import value_of
from aliasparam.tensors import dispatch

from .small import INTERLEAVE, SWAP, Layer, counting, is_ready, kernel, storage_of, the_registry

# -- what is refused touches nothing -------------------------------------------------------------------------------------


def refuses_and_changes_nothing(layers: list[Layer], do: Callable[[], Any], error: Any) -> None:
    before = [layer.weight.clone() for layer in layers]
    with pytest.raises(error):
        do()
    for layer, values in zip(layers, before, strict=True):
        assert is_ready(layer)
        assert torch.equal(layer.weight, values)
        assert torch.equal(layer(), kernel(SWAP, values))


@pytest.fixture
def two() -> list[Layer]:
    layers = [Layer(), Layer()]
    process(nn.ModuleList(layers))
    return layers


WRONG: dict[str, Callable[[list[Any]], Any]] = {
    "copy_ of another shape": lambda w: w[0].copy_(torch.zeros(5, 7)),
    "add_ of another shape": lambda w: w[0].add_(torch.zeros(5, 7, dtype=torch.uint8)),
    "masked_fill_ of another shape": lambda w: w[0].masked_fill_(torch.zeros(5, 7).bool(), 1),
    "an index out of range": lambda w: w[0].index_copy_(0, torch.tensor([0, 99]), torch.full((2, 8), 9, dtype=torch.uint8)),
    "two tensors of which the second does not fit": lambda w: torch._foreach_copy_(w, [torch.full((6, 8), 9), torch.zeros(5, 7)]),
    "copy_ of a sparse value": lambda w: w[0].copy_(torch.zeros(6, 8, dtype=torch.uint8).to_sparse()),
    "copy_ of a complex value": lambda w: w[0].copy_(torch.zeros(6, 8, 1)),
    "copy_ of a value without data": lambda w: w[0].copy_(torch.zeros(6, 8, device="meta")),
    "a shard without data": lambda w: w[0][2:].copy_(torch.zeros(4, 8, dtype=torch.uint8, device="meta")),
    "a dtype without a conversion": lambda w: w[0].copy_(torch.zeros(6, 8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)),
    "a subclass that raises": lambda w: w[0].copy_(torch.Tensor._make_subclass(Raising, torch.zeros(6, 8, dtype=torch.uint8))),
}


class Raising(Tensor):
    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} of a tensor that cannot be read")


@pytest.mark.parametrize("wrong", WRONG)
def test_law_10_an_operator_that_raises_has_written_nothing(wrong: str, two: list[Layer]) -> None:
    refuses_and_changes_nothing(two, lambda: WRONG[wrong]([layer.weight for layer in two]), (RuntimeError, IndexError))


def test_law_10_a_value_whose_bits_cannot_be_resolved_has_written_nothing() -> None:
    layer = Layer(dtype=torch.bool)
    process(layer)
    values = layer.weight.clone()

    with pytest.raises(NotImplementedError):
        layer.weight.copy_(torch._neg_view(values))

    assert is_ready(layer)
    assert torch.equal(layer.weight, values)


def test_law_10_a_refused_write_of_several_loses_no_other_tensor(two: list[Layer]) -> None:
    exposure = expose_for_writing(two[1], "weight", order="kernel")
    new = torch.zeros(6, 8, dtype=torch.uint8)

    refuses_and_changes_nothing(two[:1], lambda: torch._foreach_copy_([layer.weight for layer in two], [new, new]), StateError)
    exposure.abandon()


class DyingAllGather:
    """A collective whose peer dies when ten bytes have arrived."""

    real = torch.ops.c10d._allgather_base_.default
    _schema, tags = real._schema, real.tags

    def __call__(self, **given: Any) -> None:
        given["output_tensor"].view(-1)[:10].fill_(222)
        raise RuntimeError("peer died")


def test_law_10_a_collective_that_fails_midway_has_written_nothing(two: list[Layer]) -> None:
    operator: Any = DyingAllGather()
    arguments = (two[0].weight.data, torch.zeros(6, 8, dtype=torch.uint8), None)

    refuses_and_changes_nothing(two, lambda: dispatch._handler_for(operator)(operator, arguments, {}), RuntimeError)


def test_law_10_a_declaration_refused_for_a_tie_changes_nothing() -> None:
    a, b = nn.Module(), nn.Module()
    a.w = b.w = nn.Parameter(counting(4, 2), requires_grad=False)
    b.v = nn.Parameter(counting(4, 2), requires_grad=False)
    declare(a, Alias("w", "k", SWAP))

    with pytest.raises(DeclarationError, match="two different kernel"):
        declare(b, Alias("v", "vk", SWAP), Alias("w", "k", INTERLEAVE))

    assert type(b.v) is nn.Parameter
    assert registry_of(b) is None


# -- raw memory that a writer left in pieces ------------------------------------------------------------------------------


def test_law_10_rows_written_before_a_writer_failed_must_arrive_again() -> None:
    layer = Layer(loaded=False)
    layer.weight[:3] = 1
    exposure = expose_for_writing(layer, "weight", order="kernel")
    exposure.memory.fill_(99)
    exposure.abandon()

    layer.weight[3:] = 1
    with pytest.raises(StateError):
        process(layer)
    layer.weight[:3] = 1
    process(layer)

    assert layer().unique().tolist() == [1]


def test_law_10_what_arrived_long_ago_does_not_count_when_a_region_is_begun_again() -> None:
    layer = Layer((2, 6, 8), loaded=False)
    layer.weight[0] = 1
    assert storage_of(layer).states.each == [State.LOADED, State.EMPTY]
    expose_for_writing(layer, "weight", slice(0, 1), order="kernel").abandon()

    layer.weight[0, :3] = 2
    layer.weight[1] = 2

    with pytest.raises(StateError, match=r"region 0 of 2.*partly"):
        process(layer)


@pytest.mark.parametrize("by", ["deepcopy", "save", "retarget"])
def test_law_10_a_module_is_not_copied_nor_reordered_while_somebody_writes_its_bytes(by: str) -> None:
    layer = Layer()
    actions = {
        "deepcopy": lambda: copy.deepcopy(layer),
        "save": lambda: torch.save(layer, io.BytesIO()),
        "retarget": lambda: the_registry(layer).retarget({"weight": INTERLEAVE}),
    }

    with expose_for_writing(layer, "weight", order="kernel"):
        with pytest.raises(StateError, match="exposed"):
            actions[by]()
        with pytest.raises(StaleKernelError):
            layer()

    process(layer)
    assert torch.equal(layer(), kernel(SWAP, counting(6, 8)))
    assert torch.equal(copy.deepcopy(layer).weight, counting(6, 8))


def test_law_10_a_check_that_raises_leaves_everything_as_it_was_and_a_hook_that_raises_is_called_again() -> None:
    layer, seen = Layer(scale=True), []

    def check(registry: Any) -> None:
        if registry.module.weight[0, 0] == 13:
            raise ValueError("unlucky")

    def hook(registry: Any) -> None:
        seen.append(registry)
        if len(seen) == 2:
            raise ValueError("a cache is full")

    the_registry(layer).checks.append(check)
    the_registry(layer).on_processed.append(hook)
    process(layer)
    process(layer)
    assert len(seen) == 1, "nothing was new"
    layer.weight[0, 0], layer.scale[0] = 13, 50.0
    alpha = storage_alpha(layer)

    for _ in range(2):
        with pytest.raises(ValueError, match="unlucky"):
            process(layer)
        assert torch.equal(storage_alpha(layer), alpha) and layer.weight[0, 0] == 13
    layer.weight[0, 0] = 5
    with pytest.raises(ValueError, match="full"):
        process(layer)
    with pytest.raises(StaleKernelError):
        layer()
    process(layer)

    assert layer().shape == (6, 8) and layer.alpha.item() == 50 and len(seen) == 3


def storage_alpha(layer: Layer) -> Tensor:
    return value_of(the_registry(layer), "alpha").clone()
