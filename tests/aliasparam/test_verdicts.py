"""When a pair aliases, what keeps its source, and which memory cannot be declared or shared."""

from __future__ import annotations

import gc
import weakref
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aliasparam import (
    Alias,
    Reason,
    TensorSpec,
    declare,
    explain,
    memory_report,
    process,
    registry_of,
)
from aliasparam.errors import AdoptionError, DeclarationError, StaleKernelError
from aliasparam.layout import IndexLayout
from aliasparam.module.verdict import judge

from .small import HALVED, PAD8, SWAP, bytes_of, kernel, layer_of

# -- verdicts ------------------------------------------------------------------------------------------------------------


u8, i8, i16 = torch.uint8, torch.int8, torch.int16


@pytest.mark.parametrize(
    ("source", "kernel_format", "lossless", "reason"),
    [
        (((4, 6), u8), ((4, 6), u8), True, Reason.SAME),
        (((4, 6), u8), ((2, 12), u8), True, Reason.SAME_BYTES),
        (((4, 6), u8), ((4, 6), i8), True, Reason.SAME_BYTES),
        (((4, 6), u8), ((8, 8), u8), True, Reason.PADDED),
        (((1, 6), u8), ((8, 6), u8), True, Reason.PADDED),
        (((3,), u8), ((1,), u8), True, Reason.BROADCAST),
        (((4, 6), u8), ((4, 5), u8), True, Reason.SMALLER),
        (((4, 6), u8), ((4, 6), i16), True, Reason.ELEMENT_WIDTH),
        (((4, 6), u8), ((4, 6), u8), False, Reason.LOSSY),
    ],
)
def test_verdicts(source: Any, kernel_format: Any, lossless: bool, reason: Reason) -> None:
    found = judge(TensorSpec(*source), TensorSpec(*kernel_format), lossless=lossless)

    assert found is reason
    assert found.aliases == (reason.code in ("same", "same-bytes", "padded"))


def test_a_reencoding_keeps_its_source_and_never_drifts() -> None:
    values = bytes_of(4, 6)
    layer = layer_of(values, HALVED)
    for _ in range(3):
        layer.weight[0, 0] = values[0, 0]
        process(layer)
        assert torch.equal(layer.prepared, values // 2)
        assert torch.equal(layer.weight, values)
    assert "[lossy]" in explain(layer)
    with pytest.raises(DeclarationError, match="re-encodes values"):
        declare_strictly(values)


def declare_strictly(values: Tensor) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(values, requires_grad=False)
    declare(module, Alias("weight", "prepared", HALVED, on_mismatch="error"))


# -- memory that cannot be declared --------------------------------------------------------------------------------------


def test_overlapping_expanded_and_scattered_sources_are_refused() -> None:
    base = torch.zeros(8, 4)
    module = nn.Module()
    module.a, module.b = nn.Parameter(base[:5], requires_grad=False), nn.Parameter(base[4:], requires_grad=False)
    with pytest.raises(DeclarationError, match="overlap in memory"):
        declare(module, Alias("a", "a_"), Alias("b", "b_"))
    module.c = nn.Parameter(torch.zeros(1, 4).expand(3, 4), requires_grad=False)
    with pytest.raises(DeclarationError, match="share memory"):
        declare(module, Alias("c", "c_"))
    assert type(module.a) is nn.Parameter
    assert registry_of(module) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_names_on_several_devices_are_refused() -> None:
    module = nn.Module()
    module.a = nn.Parameter(torch.zeros(4), requires_grad=False)
    module.b = nn.Parameter(torch.zeros(4, device="cuda"), requires_grad=False)

    with pytest.raises(DeclarationError, match="several devices"):
        declare(module, Alias("a", "a_"), Alias("b", "b_"))

    assert registry_of(module) is None


def test_a_declared_module_is_not_sent_to_another_process_and_does_not_move() -> None:
    """torch would move its memory into a shared segment, under every captured address."""
    layer = layer_of(bytes_of(4, 6), SWAP)
    process(layer)
    address = layer.weight.data_ptr()

    with pytest.raises(AdoptionError, match="another process"):
        ForkingPickler.dumps(layer)

    assert layer.weight.data_ptr() == address
    assert torch.equal(layer.weight, bytes_of(4, 6))


def test_a_transposed_source_gets_contiguous_memory_of_its_own() -> None:
    base = bytes_of(4, 6)
    layer = nn.Module()
    layer.weight = nn.Parameter(base.t(), requires_grad=False)
    declare(layer, Alias("weight", "prepared", SWAP))
    process(layer)

    assert torch.equal(layer.prepared, kernel(SWAP, base.t()))
    assert torch.equal(base, bytes_of(4, 6)), "the memory of others was not touched"


def test_memory_that_somebody_else_looks_at_is_not_taken_over() -> None:
    values = bytes_of(4, 6)
    parameter = nn.Parameter(values.clone(), requires_grad=False)
    held = parameter.data
    layer = nn.Module()
    layer.weight = parameter
    declare(layer, Alias("weight", "prepared", SWAP))
    process(layer)

    assert torch.equal(held, values), "the other holder sees no kernel bytes"


# -- ties ----------------------------------------------------------------------------------------------------------------


def test_tied_weights_of_two_modules_share_one_storage() -> None:
    a, b = nn.Module(), nn.Module()
    a.weight = b.weight = nn.Parameter(bytes_of(4, 6), requires_grad=False)
    model = nn.ModuleDict({"a": a, "b": b})
    declare(a, Alias("weight", "prepared", SWAP))
    declare(b, Alias("weight", "prepared", SWAP))
    process(model)

    assert a.weight is b.weight
    assert a.prepared.data_ptr() == b.prepared.data_ptr() == a.weight.data_ptr()
    assert memory_report(model).allocated_bytes == 24
    assert list(dict(model.named_parameters())) == ["a.weight"]
    b.weight.copy_(bytes_of(4, 6, seed=2))
    for module in (a, b):
        with pytest.raises(StaleKernelError):
            module()
    process(model)
    assert torch.equal(a.prepared, kernel(SWAP, bytes_of(4, 6, seed=2)))
    with pytest.raises(NotImplementedError):  # nn.Module's own: it would run
        a()


def test_a_tie_to_equal_tables_is_no_tie_to_two_formats() -> None:
    a, b = nn.Module(), nn.Module()
    a.weight = b.weight = nn.Parameter(bytes_of(4, 6), requires_grad=False)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).view(4, 6)
    declare(a, Alias("weight", "prepared", IndexLayout(order)))
    declare(b, Alias("weight", "prepared", IndexLayout(order.clone())))
    process(nn.ModuleList([a, b]))

    assert a.prepared.data_ptr() == b.prepared.data_ptr()
    assert torch.equal(b.prepared.view(-1)[order], bytes_of(4, 6))


def test_a_table_lives_no_longer_than_what_is_declared_with_it() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(bytes_of(4, 6), requires_grad=False)
    layout = IndexLayout(torch.arange(24).view(4, 6).flip(0))
    declare(module, Alias("weight", "prepared", layout))
    alive = weakref.ref(layout)

    del module, layout
    gc.collect()

    assert alive() is None


def test_a_tie_to_two_formats_is_refused() -> None:
    a, b = nn.Module(), nn.Module()
    a.weight = b.weight = nn.Parameter(bytes_of(4, 6), requires_grad=False)
    declare(a, Alias("weight", "prepared", SWAP))

    with pytest.raises(DeclarationError, match="two different kernel"):
        declare(b, Alias("weight", "prepared", PAD8))
