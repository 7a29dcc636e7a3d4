"""Law 1 for views: of other dtypes, overlapping themselves, over several regions and padding, and as sources of writes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aliasparam import Alias, declare, process
from aliasparam.errors import StateError

from .small import SWAP, SWAP_PAD8, Layer, counting, is_ready, kernel, layer_of, storage_of

# -- another dtype over several regions --------------------------------------------------------------------------------


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("element", range(6))
def test_law_1_a_wider_view_reads_elements_that_cross_regions(element: int, mixed: bool) -> None:
    layer, expected = Layer((4, 2, 3)), counting(4, 2, 3)
    process(layer)
    if mixed:
        layer.weight[1] = layer.weight[1].clone()

    found = layer.weight.view(24).view(torch.int32)[element:] + 0

    assert torch.equal(found, expected.view(24).view(torch.int32)[element:])


@pytest.mark.parametrize("element", range(6))
def test_law_1_a_wider_view_writes_elements_that_cross_regions(element: int) -> None:
    layer, expected = Layer((4, 2, 3)), counting(4, 2, 3)
    process(layer)

    for tensor in (layer.weight, expected):
        tensor.view(24).view(torch.int32)[element] = -1

    assert torch.equal(layer.weight, expected)
    process(layer)
    assert torch.equal(layer.prepared, kernel(SWAP, expected))


@pytest.mark.parametrize("shape", [(6, 8), (3, 4, 4)])
def test_law_1_views_of_one_name_are_written_by_one_operator(shape: tuple[int, ...]) -> None:
    """Each in rows of its own, and no box."""
    layer, expected = Layer(shape), counting(*shape)
    process(layer)

    for tensor in (layer.weight, expected):
        torch._foreach_mul_([tensor[:1, ::2], tensor[2:, 1::2]], 3)  # type: ignore[arg-type]

    assert torch.equal(layer.weight, expected)


# -- expanded views ------------------------------------------------------------------------------------------------------

EXPANDED: dict[str, Callable[[Any], Any]] = {
    "rows": lambda w: w[:1].expand(6, 8),
    "columns": lambda w: w[:, 2:3].expand(6, 3),
    "a new dim": lambda w: w.expand(3, 6, 8),
    "with steps": lambda w: w[::2, :1].expand(3, 3),
    "one element": lambda w: w[2, 3].expand(2, 2),
}
SAME_EVERYWHERE: dict[str, Callable[[Tensor], Any]] = {
    "fill_": lambda view: view.fill_(7),
    "zero_": lambda view: view.zero_(),
    "several": lambda view: torch._foreach_zero_([view]),  # type: ignore[arg-type, func-returns-value]
}


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("write", SAME_EVERYWHERE)
@pytest.mark.parametrize("view", EXPANDED)
def test_law_1_one_value_is_written_through_an_expanded_view(view: str, write: str, loaded: bool) -> None:
    """Of a name that lacks elements too: all under the view have arrived then."""
    layer, expected = Layer(loaded=loaded), counting(6, 8)

    for tensor in (layer.weight, expected):
        SAME_EVERYWHERE[write](EXPANDED[view](tensor))

    assert torch.equal(EXPANDED[view](layer.weight), EXPANDED[view](expected))
    assert not loaded or torch.equal(layer.weight, expected)


def test_law_1_several_values_for_one_element_are_refused_as_of_a_plain_tensor() -> None:
    layer, expected = Layer(dtype=torch.float32), counting(6, 8).float()
    for write in (lambda v: v.copy_(torch.rand(6, 8)), lambda v: v.normal_(), lambda v: torch.add(v, 1, out=v)):
        for tensor in (layer.weight, expected):
            with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
                write(tensor[:1].expand(6, 8))

    assert torch.equal(layer.weight, expected)


def test_law_1_nothing_is_written_through_an_expanded_view_of_nothing() -> None:
    layer, expected = Layer(), counting(6, 8)
    process(layer)
    for tensor in (layer.weight, expected):
        tensor[:0].expand(2, 0, 8).add_(1)
        tensor[:0].expand(2, 0, 8).fill_(1)

    assert torch.equal(layer.weight, expected)


# -- what covers a region ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 8), (3, 4, 4)])
def test_law_1_an_overlapping_view_does_not_cover_what_it_lists_twice(shape: tuple[int, ...]) -> None:
    layer, expected = Layer(shape), counting(*shape)
    process(layer)

    for tensor in (layer.weight, expected):
        tensor.flatten()[: tensor.numel() // 2 + 1].unfold(0, 2, 1).fill_(7)

    assert torch.equal(layer.weight, expected)


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w,
        lambda w: w.transpose(-1, -2),
        lambda w: w.permute(2, 0, 1),
        lambda w: w.view(torch.int8),
        lambda w: w.flatten(0, 1) if w.is_contiguous() else w,
        lambda w: w.unsqueeze(0),
    ],
)
@pytest.mark.parametrize("transform", [SWAP, SWAP_PAD8])
def test_a_view_of_everything_loads_an_empty_tensor(view: Callable[[Any], Any], transform: Any) -> None:
    layer = Layer((3, 4, 6), transform, loaded=False)
    written = view(layer.weight)
    values = torch.arange(written.numel()).view(written.shape).to(written.dtype)

    written.copy_(values)
    process(layer)

    assert torch.equal(view(layer.weight), values)
    assert torch.equal(layer.prepared, kernel(transform, layer.weight.clone()))


@pytest.mark.parametrize(
    "write",
    [
        lambda w, k: w.add_(k),
        lambda w, k: w.copy_(k),
        lambda w, k: w[:2].copy_(k[2:4]),
        lambda w, k: w.data[1].copy_(k[5]),
        lambda w, k: w.view(torch.int8).copy_(k.view(torch.int8)),
        lambda w, k: w[::2].copy_(k[1::2]),
        lambda w, k: torch._foreach_add_([w], [k]),
        lambda w, k: torch.add(k, 1, out=w),
        lambda w, k: w.index_copy_(0, torch.tensor([1, 0]), k[3:5]),
    ],
)
def test_law_1_a_name_written_from_its_own_kernel_name(write: Callable[[Any, Tensor], Any]) -> None:
    layer, expected = Layer(), counting(6, 8)
    process(layer)
    kernel = layer.prepared.clone()

    write(layer.weight, layer.prepared)
    write(expected, kernel)

    assert torch.equal(layer.weight, expected)


# -- copies ----


def test_law_1_a_write_into_a_converted_copy_is_refused_not_lost() -> None:
    layer = Layer()
    process(layer)

    with pytest.raises(Exception, match="copy"):
        layer.weight.data.contiguous().fill_(5)
    with pytest.raises(Exception, match="copy"):
        layer.weight.contiguous()[0].fill_(5)

    assert is_ready(layer)
    assert torch.equal(layer.weight.contiguous() + 1, counting(6, 8) + 1)


# -- any chain ---------------------------------------------------------------------------------------------------------


def test_law_1_a_name_replaced_by_another_view_of_itself_takes_its_values() -> None:
    layer, expected = Layer((4, 4)), counting(4, 4).t()
    process(layer)

    layer.weight = nn.Parameter(layer.weight.data.t(), requires_grad=False)
    process(layer)

    assert torch.equal(layer.weight, expected)
    assert torch.equal(layer.prepared, kernel(SWAP, expected))


# -- conj and neg bits ---------------------------------------------------------------------------------------------------

BITS: dict[str, Callable[[Any], Any]] = {
    "conj": lambda w: w.conj(),
    "conj of rows": lambda w: w[1:3].conj(),
    "conj of conj": lambda w: w.conj().t().conj(),
    "imag of conj": lambda w: w.conj().imag,
    "imag": lambda w: w.imag[::2],
    "negated": torch._neg_view,
}


@pytest.mark.parametrize("bits", BITS)
def test_law_1_conj_and_neg_bits_are_read_and_written(bits: str) -> None:
    values = torch.complex(torch.arange(24.0).view(4, 6), torch.arange(24.0).view(4, 6) + 100)
    layer, expected = layer_of(values), values.clone()
    found, plain = BITS[bits](layer.weight), BITS[bits](expected)
    factor = 1 + 2j if plain.is_complex() else 3.0
    assert torch.equal(found.clone().resolve_neg(), plain.clone().resolve_neg())
    assert torch.equal(found * factor, plain * factor)
    assert torch.equal(copy.deepcopy(found) * factor, plain * factor)

    new = torch.rand(plain.shape, dtype=plain.dtype)
    for write in (lambda target: target.copy_(new), lambda target: target.mul_(factor)):
        write(found)
        write(plain)
        assert torch.equal(layer.weight, expected)

    process(layer)
    assert torch.equal(layer.prepared, kernel(SWAP, expected))


@pytest.mark.parametrize("bits", ["conj", "conj of rows", "conj of conj", "negated"])
@pytest.mark.parametrize("write", [lambda view: view.fill_(2), lambda view: view.zero_()])
def test_a_name_that_lacks_elements_is_filled_through_conj_and_neg_bits(bits: str, write: Callable[[Any], Any]) -> None:
    values = torch.zeros(4, 6, dtype=torch.complex64)
    layer = layer_of(values)
    storage_of(layer, "weight").invalidate()

    write(BITS[bits](layer.weight))
    write(BITS[bits](values))

    assert torch.equal(BITS[bits](layer.weight) + 0, BITS[bits](values) + 0)
    with pytest.raises(StateError) if "rows" in bits else nullcontext():
        layer.weight.clone()


def test_law_1_an_operator_that_writes_names_and_returns_something_else_returns_it() -> None:
    layer = Layer(dtype=torch.float32)
    x, plain = torch.randn(3, 8), counting(6, 8).float()

    normalize = torch.ops.aten._native_batch_norm_legit.default
    found = normalize(x, None, None, layer.weight[0], layer.weight[1], True, 0.1, 1e-5)
    expected = normalize(x, None, None, plain[0], plain[1], True, 0.1, 1e-5)

    assert torch.equal(found[0], expected[0])
    assert torch.equal(layer.weight, plain)


_aten = torch.ops.aten
#: Normalizations that update running statistics, or not; the schemas of most do not say so.
NORMALIZATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, bool], Any]] = {
    "F.batch_norm": lambda x, mean, var, trains: nn.functional.batch_norm(x, mean, var, training=trains),
    "F.instance_norm": lambda x, mean, var, trains: nn.functional.instance_norm(x, mean, var, use_input_stats=trains),
    "native": lambda x, mean, var, trains: torch.native_batch_norm(x, None, None, mean, var, trains, 0.1, 1e-5)[0],
    "native, out=": lambda x, mean, var, trains: _aten.native_batch_norm.out(
        x, None, None, mean, var, trains, 0.1, 1e-5, out=x.clone(), save_mean=mean.new_empty(0), save_invstd=mean.new_empty(0)
    )[0],
    "legit": lambda x, mean, var, trains: _aten._native_batch_norm_legit(x, None, None, mean, var, trains, 0.1, 1e-5)[0],
    "statistics alone": lambda x, mean, var, trains: trains and torch.batch_norm_update_stats(x, mean, var, 0.1)[0],
}


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("how", NORMALIZATIONS)
def test_law_1_running_statistics_are_updated_in_training_alone(how: str, trains: bool) -> None:
    layer, x, plain = Layer(dtype=torch.float32), torch.randn(2, 8, 4), counting(6, 8).float()
    process(layer)

    found = NORMALIZATIONS[how](x, layer.weight[0], layer.weight[1], trains)
    expected = NORMALIZATIONS[how](x, plain[0], plain[1], trains)

    assert torch.equal(layer.weight, plain) and (not isinstance(found, Tensor) or torch.equal(found, expected))
    assert trains != torch.equal(plain, counting(6, 8).float())
    # The schema of one says that it writes; torch 2.8 writes back what the other has read.
    assert is_ready(layer) or trains or how in ("legit", "F.instance_norm")


@pytest.mark.parametrize("shape", [(), (2,), (0, 3)])
@pytest.mark.parametrize("empty", [lambda w: w.view(-1)[1::2][:0], lambda w: w.view(-1)[w.numel() :], lambda w: w.view(-1)[:0]])
def test_law_1_a_view_of_no_elements_lacks_none(shape: tuple[int, ...], empty: Callable[[Tensor], Tensor]) -> None:
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.zeros(shape), requires_grad=False)
    declare(layer, Alias("weight", "prepared"), loaded=False)

    empty(layer.weight).fill_(1)

    assert torch.equal(empty(layer.weight).clone(), torch.empty(0)) and not is_ready(layer)


@pytest.mark.parametrize("shape", [(6, 1), (1, 6, 1), (3, 6, 1)])
@pytest.mark.parametrize("view", [lambda w: w, lambda w: w.transpose(0, 1), lambda w: w.unsqueeze(-1)])
def test_law_1_values_of_one_column_can_be_looked_at_as_bytes(shape: tuple[int, ...], view: Callable[[Any], Any]) -> None:
    values = counting(*shape).half()
    layer = layer_of(values)

    assert torch.equal(view(layer.weight).clone().view(torch.uint8), view(values).clone().view(torch.uint8))


@pytest.mark.parametrize("schema", ["adds(Tensor x, *, Tensor(a!) out) -> ()", "fill_(Tensor x, Tensor(a!) out) -> ()"])
def test_law_1_operators_of_others_may_read_what_they_write(schema: str) -> None:
    """Also those which are called like an operator of torch that overwrites."""
    with torch.library._scoped_library("aliasparam_views", "FRAGMENT") as library:
        name = library.define(schema)
        library.impl(name, _add_some, "CPU")
        operator = getattr(torch.ops.aliasparam_views, name)
        layer, expected = Layer(), counting(6, 8)
        for tensor in (layer.weight, expected):
            operator(out=tensor, x=torch.tensor(3, dtype=torch.uint8))

    assert torch.equal(layer.weight, expected)


def _add_some(x: Tensor, out: Tensor) -> None:
    out[:2] += x


def test_law_1_an_out_that_must_have_the_shape_of_the_result_is_written() -> None:
    layer, expected, source = Layer(), counting(6, 8), counting(6, 8) + 1

    for tensor in (layer.weight, expected):
        torch.split_copy(source, 4, out=[tensor[:4], tensor[4:]])

    assert torch.equal(layer.weight, expected)
