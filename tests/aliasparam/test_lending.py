"""Memory that others write, sleeping, threads, chains of derivations, and other formats."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from aliasparam import (
    Alias,
    Derivation,
   ,
   ,
   ,
   ,
    declare,
    expose_for_writing,
    invalidate,
    process,
    registry_of,
)
from aliasparam.errors import DeclarationError, PointerError, ReloadError, StaleKernelError, StateError

from .small import INTERLEAVE, PAD16, SWAP, SWAP_PAD16, bytes_of, kernel, layer_of


# -- exposures -----------------------------------------------------------------------------------------------------------


def test_an_exposure_names_the_bytes_and_nothing_reads_meanwhile(device: torch.device) -> None:
    values = bytes_of(4, 8, 6).to(device)
    layer = layer_of(values, SWAP_PAD16)
    process(layer)

    exposure = expose_for_writing(layer, "weight", slice(1, 3), writer="RDMA")
    assert exposure.address == exposure.memory.data_ptr()
    for action in (lambda: layer.weight.clone(), lambda: layer.weight[0].zero_(), lambda: process(layer)):
        with pytest.raises(StateError, match="exposed to RDMA"):
            action()
    with pytest.raises(StaleKernelError):
        layer()
    exposure.memory[1].fill_(9)  # as a remote writer would, past every operator
    exposure.written(slice(1, 2))
    with pytest.raises(ReloadError, match="closed already"):
        exposure.written()

    values[2] = 9
    assert torch.equal(layer.weight, values)
    process(layer)
    assert torch.equal(layer.prepared, kernel(SWAP_PAD16, values))


def test_what_was_never_loaded_is_loaded_by_what_was_written_and_no_more() -> None:
    values = bytes_of(4, 8, 6)
    layer = layer_of(torch.zeros_like(values), SWAP, loaded=False)
    exposure = expose_for_writing(layer, "weight")
    exposure.memory.copy_(values)
    exposure.written(slice(0, 3))

    with pytest.raises(StateError, match=r"partly written|empty"):
        process(layer)
    with expose_for_writing(layer, "weight", slice(3, 4)) as last:
        last.memory.copy_(values[3:])
    process(layer)
    assert torch.equal(layer.prepared, kernel(SWAP, values))


def test_an_abandoned_exposure_leaves_a_refusal() -> None:
    layer = layer_of(bytes_of(4, 8, 6), SWAP)
    process(layer)
    with pytest.raises(RuntimeError, match="link down"), expose_for_writing(layer, "weight", slice(2, 3)):
        raise RuntimeError("link down")

    with pytest.raises(StateError, match="invalid"):
        process(layer)
    layer.weight[2].copy_(torch.zeros(8, 6))
    assert process(layer) >= 1
    with pytest.raises(ReloadError, match="only declared checkpoint names"):
        expose_for_writing(layer, "prepared")


# -- bulk loads ----------------------------------------------------------------------------------------------------------


def test_law_8_a_bulk_load_that_fails_leaves_a_refusal() -> None:
    layer = layer_of(bytes_of(4, 6), SWAP)
    process(layer)
    with pytest.raises(RuntimeError, match="disk"), bulk_load(layer):
        layer.weight.data[0] = 1
        raise RuntimeError("disk")

    with pytest.raises(StaleKernelError):
        layer()
    with pytest.raises(StateError, match="invalid"):
        layer.weight.clone()


def test_a_name_from_before_a_bulk_load_refuses_inside_it() -> None:
    layer = layer_of(bytes_of(4, 6), SWAP)
    before = layer.weight
    with bulk_load(layer):
        assert type(layer.weight) is nn.Parameter
        with pytest.raises(StateError, match="a bulk load"):
            before.copy_(torch.zeros(4, 6))
        with pytest.raises(StateError, match="exposed"), bulk_load(layer):
            pass
        layer.weight = replacement = nn.Parameter(bytes_of(4, 6, seed=3), requires_grad=False)  # loaders replace, too
    process(layer)

    assert layer.weight is replacement and layer.weight.data_ptr() == before.data_ptr()
    assert torch.equal(before, layer.weight)
    assert torch.equal(layer.prepared, kernel(SWAP, bytes_of(4, 6, seed=3)))


# -- sleep ---------------------------------------------------------------------------------------------------------------


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
    layer = layer_of(bytes_of(8, 64, 32), SWAP.then(PadLast2(128, 64)))
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
    assert torch.equal(
        layer.prepared, SWAP.then(PadLast2(128, 64)).forward(torch.full((8, 64, 32), 29, dtype=torch.uint8))
    )


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
    assert process(layer) == 3

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
    assert process(layer) == 3


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
