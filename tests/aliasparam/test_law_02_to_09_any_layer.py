"""Laws 2 to 7 and 9 for any layer: random layouts, shapes, dtypes, room for others, a re-encoding and a chain of derivations."""

from __future__ import annotations

import copy
import io

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from aliasparam import Alias, checkpoint_state_dict, declare, memory_report, process
from aliasparam.testing import LayerPlan, expected_kernel_names, layers, random_values, same_bytes

from .small import the_registry

SEEDS = st.integers(0, 1 << 16)


def values(layer: nn.Module, seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: random_values(source.plan.source, random) for name, source in the_registry(layer).sources.items()}


def loaded(plan: LayerPlan, checkpoint: dict[str, Tensor], *, aliasing: bool = True) -> nn.Module:
    layer = plan.make(aliasing=aliasing)
    for name, value in checkpoint.items():
        layer.get_parameter(name).data.copy_(value)
    process(layer)
    return layer


def kernel_bytes(layer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.named_buffers()}


def addresses(layer: nn.Module) -> dict[str, int]:
    return {n: t.data_ptr() for n, t in (*layer.named_parameters(), *layer.named_buffers())}


def alike(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(same_bytes(a[name], b[name]) for name in a)


@given(layers(), SEEDS)
def test_law_2_processing_again_does_nothing(plan: LayerPlan, seed: int) -> None:
    layer = loaded(plan, values(plan.make(), seed))
    before = kernel_bytes(layer)

    assert process(layer) == process(layer) == 0
    assert alike(kernel_bytes(layer), before)


@given(layers(), SEEDS)
def test_law_3_and_9_a_reload_moves_nothing_and_is_a_fresh_load(plan: LayerPlan, seed: int) -> None:
    empty = plan.make()
    declared = addresses(empty)
    old, new = values(empty, seed), values(empty, seed + 1)
    layer = empty
    for checkpoint in (old, new, old, new):
        layer.load_state_dict(checkpoint)
        process(layer)
        assert addresses(layer) == declared

    assert alike(kernel_bytes(layer), kernel_bytes(loaded(plan, new)))


@given(layers(), SEEDS)
def test_law_4_allocated_is_the_sum_of_capacities_and_what_fell_back(plan: LayerPlan, seed: int) -> None:
    layer = loaded(plan, values(plan.make(), seed))

    held = {s.data_ptr(): s.nbytes() for t in (*layer.parameters(), *layer.buffers()) for s in [Tensor.untyped_storage(t)]}

    assert sum(held.values()) == memory_report(layer).allocated_bytes


@given(layers(), SEEDS)
def test_law_5_the_checkpoint_is_what_was_loaded_also_through_a_file(plan: LayerPlan, seed: int) -> None:
    checkpoint = values(plan.make(), seed)
    layer = loaded(plan, checkpoint)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)

    exported = checkpoint_state_dict(layer)
    layer.get_parameter("weight").zero_()

    assert alike(exported, checkpoint), "and it stays so, whatever is loaded later"
    assert alike(torch.load(file, weights_only=True), checkpoint)


@given(layers(), SEEDS, st.integers(0, 2))
def test_law_6_a_part_of_a_reload_gives_the_bytes_of_the_whole(plan: LayerPlan, seed: int, part: int) -> None:
    old, new = values(plan.make(), seed), values(plan.make(), seed + 1)
    name = list(old)[part]
    layer = loaded(plan, old)

    layer.get_parameter(name).copy_(new[name])
    process(layer)

    assert alike(kernel_bytes(layer), kernel_bytes(loaded(plan, old | {name: new[name]})))


@given(layers(), SEEDS)
def test_law_7_without_aliasing_all_results_are_the_same(plan: LayerPlan, seed: int) -> None:
    checkpoint = values(plan.make(), seed)
    shared, apart = loaded(plan, checkpoint), loaded(plan, checkpoint, aliasing=False)

    assert alike(kernel_bytes(shared), kernel_bytes(apart))
    assert alike(kernel_bytes(shared), expected_kernel_names(the_registry(shared), checkpoint))
    assert alike(checkpoint_state_dict(shared), checkpoint_state_dict(apart))


@given(layers(), SEEDS)
def test_values_that_a_parameter_had_when_it_was_declared_are_brought_into_order(plan: LayerPlan, seed: int) -> None:
    empty = plan.make()
    checkpoint, registry = values(empty, seed), the_registry(empty)
    twin = nn.Module()
    twin.weight = nn.Parameter(checkpoint["weight"].clone(), requires_grad=False)

    declare(twin, Alias("weight", "weight_prepared", plan.line, room_for=plan.room_for, dtype=plan.kernel_dtype))
    process(twin)

    assert same_bytes(twin.weight_prepared, expected_kernel_names(registry, checkpoint)["weight_prepared"])
    assert same_bytes(twin.weight.clone(), checkpoint["weight"])


@given(layers(), SEEDS)
def test_a_copy_is_a_module_of_its_own(plan: LayerPlan, seed: int) -> None:
    layer = loaded(plan, values(plan.make(), seed))
    before, new = kernel_bytes(layer), values(layer, seed + 1)
    twin = copy.deepcopy(layer)

    twin.load_state_dict(new)
    process(twin)

    assert alike(kernel_bytes(layer), before)
    assert alike(kernel_bytes(twin), expected_kernel_names(the_registry(twin), new))
    assert not set(addresses(layer).values()) & set(addresses(twin).values())
