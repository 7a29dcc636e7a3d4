"""Memory that others write, sleeping, threads, chains of derivations, and other formats."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from aliasparam import (
    Alias,
    Derivation,
    declare,
    invalidate,
    process,
    registry_of,
)
from aliasparam.errors import DeclarationError, PointerError, StaleKernelError, StateError
from aliasparam.storage.states import State

from .small import INTERLEAVE, PAD16, SWAP, SWAP_PAD16, bytes_of, kernel, layer_of, storage_of, the_registry

# -- exposures -----------------------------------------------------------------------------------------------------------


def test_law_8_after_sleep_nothing_reads_until_it_is_loaded_whole() -> None:
    layer = layer_of(bytes_of(4, 6), SWAP)
    process(layer)
    address = layer.prepared.data_ptr()
    invalidate(layer)

    for action in (lambda: layer.weight.clone(), lambda: process(layer), lambda: layer.weight.add_(1)):
        with pytest.raises(StateError, match="invalid"):
            action()
    with pytest.raises(StaleKernelError):
        layer()
    layer.weight.copy_(bytes_of(4, 6))
    process(layer)
    assert layer.prepared.data_ptr() == address


# -- threads -------------------------------------------------------------------------------------------------------------


def test_law_1_eight_threads_load_and_process_at_once() -> None:
    layer = layer_of(bytes_of(8, 64, 32), SWAP_PAD16)
    process(layer)
    failures: list[BaseException] = []

    def work(expert: int) -> None:
        try:
            for step in range(30):
                layer.weight[expert].copy_(torch.full((64, 32), step, dtype=torch.uint8))
                if step % 7 == expert % 7:
                    process(layer)
                found = layer.weight[expert].clone()
                assert bool((found == step).all()), found
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(e,)) for e in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not failures
    process(layer)
    assert bool((layer.weight == 29).all())
    assert torch.equal(layer.prepared, kernel(SWAP_PAD16, torch.full((8, 64, 32), 29, dtype=torch.uint8)))


# -- derivations ---------------------------------------------------------------------------------------------------------


def test_a_chain_of_derivations_refreshes_in_order_and_keeps_addresses() -> None:
    layer = nn.Module()
    layer.scale = nn.Parameter(torch.tensor([1.0, 4.0]), requires_grad=False)
    declare(
        layer,
        Derivation("c", ("b",), torch.sqrt, (1,), torch.float32),
        Derivation("b", ("a",), torch.reciprocal, (1,), torch.float32),
        Derivation("a", ("scale",), lambda s: s.max().reshape(1), (1,), torch.float32),
    )
    process(layer)
    addresses = [layer.get_buffer(n).data_ptr() for n in "abc"]
    layer.scale[1] = 16.0
    assert process(layer) > 0

    assert layer.c.item() == 0.25
    assert [layer.get_buffer(n).data_ptr() for n in "abc"] == addresses
    assert process(layer) == 0


# -- retarget ------------------------------------------------------------------------------------------------------------


def test_retarget_changes_the_kernel_format_in_place_and_back() -> None:
    values = bytes_of(3, 8, 6)
    padded = SWAP_PAD16
    layer = nn.Module()
    layer.weight = nn.Parameter(values.clone(), requires_grad=False)
    registry = declare(layer, Alias("weight", "prepared", SWAP, room_for=(padded,)))
    process(layer)
    address = layer.prepared.data_ptr()

    for transform in (padded, SWAP, INTERLEAVE, padded):
        registry.retarget({"weight": transform})
        with pytest.raises(StaleKernelError):
            layer()
        process(layer)
        assert torch.equal(layer.prepared, kernel(transform, values))
        assert torch.equal(layer.weight, values)
        assert layer.prepared.data_ptr() == address


@pytest.mark.parametrize("first, second", [("e r k -> e k r", "r k -> k r"), ("r k -> k r", "e r k -> e k r")])
def test_shards_arrive_in_a_layout_that_counts_a_dim_of_one_otherwise(first: str, second: str) -> None:
    values = bytes_of(1, 8, 6)
    layer = layer_of(values, first, loaded=False)
    layer.weight[0, :2].copy_(values[0, :2])
    the_registry(layer).retarget({"weight": second})

    for rows in (slice(4, 8), slice(2, 4)):
        assert storage_of(layer).state is State.PARTIAL
        layer.weight[0, rows].copy_(values[0, rows])

    process(layer)
    assert torch.equal(layer.weight, values)


def test_retarget_refuses_what_does_not_fit() -> None:
    layer = layer_of(bytes_of(3, 8, 6), SWAP)
    registry = registry_of(layer)
    assert registry is not None
    with pytest.raises(PointerError, match="Plan room"):
        registry.retarget({"weight": PAD16})
    with pytest.raises(DeclarationError, match="only a source with an aliased kernel name"):
        registry.retarget({"prepared": SWAP})
    other = nn.Module()
    other.weight = layer.weight
    declare(other, Alias("weight", "prepared", SWAP))
    with pytest.raises(DeclarationError, match="tied"):
        registry.retarget({"weight": INTERLEAVE})
    assert process(layer) > 0


def test_a_hook_runs_after_something_was_converted_and_only_then() -> None:
    layer = layer_of(bytes_of(8, 6), SWAP)
    registry = registry_of(layer)
    assert registry is not None
    seen: list[object] = []
    registry.on_processed.append(seen.append)

    process(layer)
    process(layer)
    layer.weight[0] = 1
    process(layer)

    assert seen == [registry, registry]
