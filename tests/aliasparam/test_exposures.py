"""Memory that others write: staging in checkpoint order, or the memory itself in kernel order."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from aliasparam import expose_for_writing, invalidate, process
from aliasparam.errors import ReloadError, StaleKernelError, StateError

from .small import SWAP, SWAP_PAD16, bytes_of, is_ready, kernel, layer_of, storage_of


def test_staging_lands_when_it_is_written_and_the_model_serves_until_then(device: torch.device) -> None:
    values = bytes_of(4, 8, 6).to(device)
    layer = layer_of(values, SWAP_PAD16)
    process(layer)

    exposure = expose_for_writing(layer, "weight", slice(1, 3), writer="RDMA")
    assert exposure.address == exposure.memory.data_ptr()
    exposure.memory[1].fill_(9)
    assert is_ready(layer) and torch.equal(layer.weight, values)
    exposure.written(slice(1, 2))
    with pytest.raises(ReloadError, match="closed already"):
        exposure.written()

    values[2] = 9
    assert torch.equal(layer.weight, values)
    process(layer)
    assert torch.equal(layer.prepared, kernel(SWAP_PAD16, values))


def test_in_kernel_order_nothing_reads_the_memory_until_it_is_written(device: torch.device) -> None:
    values = bytes_of(4, 8, 6).to(device)
    layer = layer_of(values, SWAP_PAD16)
    process(layer)

    exposure = expose_for_writing(layer, "weight", slice(1, 3), order="kernel", writer="RDMA")
    moved = partial(storage_of(layer, "weight").relocate, device)  # the writer holds the address
    for action in (lambda: layer.weight.clone(), lambda: layer.weight[0].zero_(), lambda: process(layer), moved):
        with pytest.raises(StateError, match="exposed to RDMA"):
            action()
    with pytest.raises(StaleKernelError):
        layer()
    new = bytes_of(2, 8, 6, seed=5).to(device)
    exposure.memory.copy_(kernel(SWAP_PAD16, new))  # as a remote writer would, past every operator
    exposure.written()

    values[1:3] = new
    assert torch.equal(layer.weight, values)
    process(layer)
    assert torch.equal(layer.prepared, kernel(SWAP_PAD16, values))
    assert exposure.address == layer.prepared[1].data_ptr()


@pytest.mark.parametrize("order", ["checkpoint", "kernel"])
def test_what_was_never_loaded_is_loaded_by_what_was_written_and_no_more(order: str) -> None:
    values = bytes_of(4, 8, 6)
    prepared = values if order == "checkpoint" else kernel(SWAP, values)
    layer = layer_of(torch.zeros_like(values), SWAP, loaded=False)
    exposure = expose_for_writing(layer, "weight", order=order)  # type: ignore[arg-type]
    exposure.memory.copy_(prepared)
    exposure.written(slice(0, 3))

    with pytest.raises(StateError, match=r"region 3 of 4"):
        process(layer)
    with expose_for_writing(layer, "weight", slice(3, 4), order=order) as last:  # type: ignore[arg-type]
        last.memory.copy_(prepared[3:])
    process(layer)
    assert torch.equal(layer.prepared, kernel(SWAP, values))


@pytest.mark.parametrize("rows", [slice(0, 4, 2), slice(None, None, -1), 2], ids=str)
@pytest.mark.parametrize("shape", [(4, 8, 6), (4, 6)])
def test_law_8_rows_that_are_no_range_are_neither_lent_nor_counted(rows: Any, shape: tuple[int, ...]) -> None:
    """Those between would count as written; without experts the rows of memory are not the checkpoint's."""
    layer = layer_of(bytes_of(*shape), SWAP, loaded=False)
    with pytest.raises(ReloadError, match="no range of the memory"):
        expose_for_writing(layer, "weight", rows, order="kernel")
    exposure = expose_for_writing(layer, "weight", order="kernel")
    for wrong in (rows, slice(1, 3)) if len(shape) == 2 else (rows,):
        with pytest.raises(ReloadError, match="no range of the memory"):
            exposure.written(wrong)
    exposure.memory.copy_(kernel(SWAP, bytes_of(*shape)))
    exposure.written(slice(0, 4))
    process(layer)
    assert torch.equal(layer.weight, bytes_of(*shape))


@pytest.mark.parametrize("layout", [SWAP_PAD16, None])
@pytest.mark.parametrize("shape", [(4, 8, 6), (8, 6), (48,)])
def test_law_8_a_writer_of_no_rows_is_lent_no_memory(shape: tuple[int, ...], layout: Any) -> None:
    values = bytes_of(*shape)
    layer = layer_of(values, layout if len(shape) > 1 else "k -> ~k")

    with expose_for_writing(layer, "weight", slice(2, 2), order="kernel") as exposure:
        exposure.memory.fill_(9)

    assert exposure.memory.numel() == 0
    assert torch.equal(layer.weight, values)


def test_an_abandoned_writer_in_kernel_order_leaves_a_refusal_and_in_checkpoint_order_nothing() -> None:
    layer = layer_of(bytes_of(4, 8, 6), SWAP)
    process(layer)
    with pytest.raises(RuntimeError, match="link down"), expose_for_writing(layer, "weight", slice(2, 3)):
        raise RuntimeError("link down")
    assert is_ready(layer)

    with pytest.raises(RuntimeError, match="link down"), expose_for_writing(layer, "weight", slice(2, 3), order="kernel"):
        raise RuntimeError("link down")
    with pytest.raises(StateError, match="invalid"):
        process(layer)
    layer.weight[2].copy_(torch.zeros(8, 6))
    assert process(layer) >= 1


def test_law_8_a_write_of_some_elements_after_a_dropped_writer_leaves_a_refusal_of_the_others() -> None:
    layer = layer_of(bytes_of(8, 6), SWAP)
    exposure = expose_for_writing(layer, "weight", order="kernel")
    exposure.memory.fill_(9)
    del exposure
    layer.weight[:, ::2].fill_(0)
    assert not layer.weight[:, ::2].any()
    with pytest.raises(StateError, match="partly written"):
        layer.weight.clone()


def test_rows_that_kernel_order_does_not_keep_together_are_lent_as_staging_only() -> None:
    layer = layer_of(bytes_of(8, 6), SWAP)

    with pytest.raises(ReloadError, match="these rows are no range of the memory"):
        expose_for_writing(layer, "weight", slice(0, 2), order="kernel")
    with expose_for_writing(layer, "weight", slice(0, 2)) as exposure:
        exposure.memory.fill_(1)
    assert layer.weight[:2].unique().tolist() == [1]


def test_an_exposure_that_the_model_forgot_does_not_count() -> None:
    layer = layer_of(bytes_of(8, 6), SWAP)
    exposure = expose_for_writing(layer, "weight", order="kernel")
    invalidate(layer)

    with pytest.raises(ReloadError, match="ended from elsewhere"):
        exposure.written()
    with pytest.raises(StateError, match="invalid"):
        process(layer)
