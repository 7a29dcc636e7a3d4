"""Law 11: a layout is found from the function that applies it; what is no permutation is told apart."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aliasparam.errors import (
    DependsOnValuesError,
    ElementsLostError,
    FunctionFailedError,
    InferenceError,
    NotDeterministicError,
    ValuesChangeError,
)
from aliasparam.layout import IndexLayout, Layout, LayoutError, OpaqueLayout

from .layout_oracle import DTYPES, Case, bits, cases, core_shapes, random


def applied(case: Case) -> Callable[[Tensor], Tensor]:
    """The function that the data describe, by loops."""

    def function(value: Tensor) -> Tensor:
        shape = tuple(value.shape)
        out = bits(value).new_zeros(case.capacity(shape))
        out[case.positions(shape).reshape(-1)] = bits(value).reshape(-1)
        return out.view(value.dtype).view(case.padded(shape))

    return function


@settings(max_examples=15)
@given(st.data(), cases(2, halves=False), st.sampled_from(DTYPES))
def test_what_is_inferred_does_the_same(data: Any, case: Case, dtype: torch.dtype) -> None:
    shape = data.draw(core_shapes(case, 8))
    function = applied(case)

    layout = Layout.infer(function, shape, dtype)

    bound, value = layout.bind(shape, dtype), random(shape, dtype)
    memory = torch.zeros(bound.region_capacity, dtype=dtype)
    bound.write(memory, bound.whole, value)
    assert torch.equal(bits(memory), bits(function(value)).reshape(-1))


LINES = [
    ("(g b a) k -> g a b k, a=4 b=8", (3, 96, 10)),
    ("(rt r4 r32) (ct c4) -> rt ct r32 r4 c4, r4=4 r32=32 c4=4", (3, 256, 8)),
    ("(rt r4 r32) (ct c4) -> rt ct r32 r4 c4, r4=4 r32=32 c4=4", (200, 6)),
    ("(h g b a) k -> g a ~h b k, h=2 b=8 a=2", (64, 6)),
    ("(h (i g b a)) (k m c4) -> i k m a ~h b g c4, h=2 g=4 b=8 a=2 m=2 c4=4", (300, 6)),
    ("(h (i r)) k -> i ~h r k, h=2 r=64", (150, 6)),
    ("(n w b1 q l) (k b0 p) -> k (n q l p w b1 b0), w=2 b1=2 q=2 l=8 b0=2 p=4", (128, 16)),
    ("(m a) (k c) -> k (m a) c, a=4 c=4", (130, 6)),
    ("(kt e1 l4 e0) (n b h ch cl) -> kt (n cl ch l4 b e0 h e1), e1=2 l4=4 e0=2 b=4 h=2 ch=2 cl=4, bits=4", (32, 64)),
]


@pytest.mark.parametrize(("text", "shape"), LINES)
def test_the_very_line_is_found(text: str, shape: tuple[int, ...]) -> None:
    """From one shape, and a look at a few others: which digit is free, how far halves are padded, what experts are."""
    layout = Layout(text)

    def function(value: Tensor) -> Tensor:
        bound = layout.bind(tuple(value.shape), value.dtype)
        memory = torch.zeros(bound.regions * bound.region_capacity, dtype=value.dtype)
        bound.write(memory, bound.whole, value)
        return memory.view(bound.kernel_shape)

    assert Layout.infer(function, shape, torch.uint8) == layout


@pytest.mark.parametrize("shape", [(3, 256, 8), (2, 3, 200, 6)])
def test_experts_whose_rows_follow_one_another_are_regions(shape: tuple[int, ...]) -> None:
    swizzle = Layout("(rt r4 r32) (ct c4) -> rt ct r32 r4 c4, r4=4 r32=32 c4=4")

    found = Layout.infer(lambda x: swizzle.bind(x.shape, x.dtype).encode(x).flatten(0, -2), shape, torch.uint8)

    assert found == swizzle


def test_halves_that_tiles_cut_are_two_lines() -> None:
    swapped = Layout("(h i) k -> (~h i) k, h=2").then(Layout("(t r) k -> t k r, r=8"))

    layout = Layout.infer(lambda x: tiled(x.roll(x.shape[0] // 2, 0)), (24, 4), torch.uint8)

    assert isinstance(layout, Layout) and len(layout.lines) == 2
    for shape in ((24, 4), (72, 6)):
        assert torch.equal(layout.bind(shape, torch.uint8).offsets(), swapped.bind(shape, torch.uint8).offsets())


def tiled(value: Tensor) -> Tensor:
    rows, columns = value.shape
    return value.view(rows // 8, 8, columns).transpose(1, 2).reshape(rows, columns)


def test_a_permutation_without_digits_is_a_table() -> None:
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))

    layout = Layout.infer(lambda x: x[:, order], (3, 37, 4), torch.bfloat16)

    assert isinstance(layout, IndexLayout) and layout.core_dims == 2
    bound, value = layout.bind((5, 37, 4), torch.bfloat16), random((5, 37, 4), torch.bfloat16)
    memory = torch.zeros(value.numel(), dtype=torch.bfloat16)
    box = ((1, 4), (5, 30), (0, 3))
    part = value[1:4, 5:30, :3]
    bound.write(memory, bound.whole, value)
    assert torch.equal(bits(memory.view(5, 37, 4)), bits(value[:, order]))
    assert torch.equal(bits(bound.read(memory, box)), bits(part))
    again = torch.zeros_like(memory)
    bound.write(again, box, part)
    assert torch.equal(bits(again)[bound.offsets(box)], bits(part)) and int((bits(again) != 0).sum()) == part.numel()


def test_shapes_that_move_other_units_do_not_count() -> None:
    """Of three bytes nibbles move; of the shapes that are tried beside it some move whole ones."""
    layout = Layout("(h (f a b)) -> f h a b, a=4 b=3 h=2 bits=4")

    found = Layout.infer(lambda x: layout.bind(x.shape, x.dtype).encode(x), (3,), torch.uint8)

    value = random((3,), torch.uint8)
    assert torch.equal(found.bind((3,), torch.uint8).encode(value), layout.bind((3,), torch.uint8).encode(value))


def random_order(value: Tensor) -> Tensor:
    return value[torch.randperm(value.shape[0])]


def fails(value: Tensor) -> Tensor:
    raise ValueError("no such kernel")


@pytest.mark.parametrize(
    ("function", "error", "text"),
    [
        (lambda x: x + 1, ValuesChangeError, "changes values"),
        (lambda x: torch.cat([x, torch.ones_like(x)]), ValuesChangeError, "constant but not zero"),
        (lambda x: x & 0x77, ValuesChangeError, "changes values"),
        (lambda x: x[:8], ElementsLostError, r"element \[8, 0\] is in its result 0 times"),
        (lambda x: torch.cat([x, x[:1]]), ElementsLostError, r"element \[0, 0\] is in its result 2 times"),
        (lambda x: x.sort(0).values, DependsOnValuesError, "elsewhere"),
        (lambda x: x[: int(x[0, 0]) % 4 + 9], InferenceError, "other sizes"),
        (random_order, NotDeterministicError, "same input"),
        (fails, FunctionFailedError, "no such kernel"),
        (lambda x: None, FunctionFailedError, "no tensor"),
        (lambda x: x.to("meta"), FunctionFailedError, "on meta"),
        (lambda x: x.to_sparse(), FunctionFailedError, "sparse_coo"),
        (torch._neg_view, ValuesChangeError, "changes values"),
    ],
)
def test_what_is_no_permutation_is_told_apart(function: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as raised:
        Layout.infer(function, (16, 4), torch.uint8)
    if error in (ValuesChangeError, ElementsLostError, DependsOnValuesError):
        assert "Reencoding(" in str(raised.value)  # what there is for such functions


@pytest.mark.parametrize("shape", [(1,), (16, 4), (256,), (3, 256), (5, 512)])
@pytest.mark.parametrize("function", [lambda x: x + 1, lambda x: x ^ 0x15, lambda x: 255 - x.flip(0)])
def test_a_function_of_values_changes_values_whatever_the_shape(function: Any, shape: tuple[int, ...]) -> None:
    """Of 256 position codes each byte is there once, before and after: their counts do not tell."""
    with pytest.raises(ValuesChangeError, match="changes values"):
        Layout.infer(function, shape, torch.uint8)


@pytest.mark.parametrize("shape", [(1,), (2,), (256,)])
def test_nibbles_that_change_places_are_found_in_any_shape(shape: tuple[int, ...]) -> None:
    found = Layout.infer(lambda x: x << 4 | x >> 4, shape, torch.uint8)

    value = random(shape, torch.uint8)
    assert torch.equal(found.bind(shape, torch.uint8).encode(value), value << 4 | value >> 4)


def test_padding_that_is_a_function_of_values_is_told() -> None:
    """It is zero for the first codes, and for others a number that no byte of the tensor has."""
    with pytest.raises(DependsOnValuesError, match="byte 512 differs"):
        Layout.infer(lambda x: torch.cat([x, x.new_full((1,), 255 * int(x.max() == 1))]), (512,), torch.uint8)


def test_one_element_is_in_order_at_any_stride() -> None:
    found = Layout.infer(lambda x: x.as_strided((1,), (2,)), (1,), torch.float32)

    assert found.bind((1,), torch.float32).offsets().tolist() == [0]


def test_an_order_that_depends_on_the_values() -> None:
    """Position codes are small numbers in this tensor; random bytes are not."""
    with pytest.raises(DependsOnValuesError):
        Layout.infer(lambda x: x.flip(0) if int(x[0, 0]) not in (0, 255) else x, (16, 2), torch.uint8)


def test_an_opaque_layout_is_read_and_written_by_whole_regions() -> None:
    layout = OpaqueLayout(lambda x: x.flip(-1) ^ 0x5A, lambda x: (x ^ 0x5A).flip(-1))
    bound, value = layout.bind((3, 4, 6), torch.uint8), random((3, 4, 6), torch.uint8)
    memory = torch.zeros(72, dtype=torch.uint8)
    box, part = ((1, 3), (1, 4), (2, 5)), random((2, 3, 3), torch.uint8, seed=2)

    bound.write(memory, bound.whole, value)
    assert torch.equal(memory.view(3, 4, 6), value.flip(-1) ^ 0x5A)
    bound.write(memory, box, part)

    value[1:3, 1:4, 2:5] = part
    assert torch.equal(bound.read(memory, bound.whole), value) and torch.equal(bound.read(memory, box), part)


def test_law_1_an_opaque_layout_whose_functions_work_in_place_changes_no_value_of_the_caller() -> None:
    layout = OpaqueLayout(lambda x: x.add_(1), lambda x: x.sub_(1))
    bound, value = layout.bind((3, 4, 6), torch.uint8), random((3, 4, 6), torch.uint8)
    memory, given = torch.zeros(72, dtype=torch.uint8), value.clone()

    bound.write(memory, bound.whole, given)

    assert torch.equal(given, value)
    assert torch.equal(bound.read(memory, bound.whole), value) and torch.equal(memory.view(3, 4, 6), value + 1)


@pytest.mark.parametrize("encode", [lambda x: x.view(torch.int16), lambda x: x.float(), lambda x: None])
def test_a_function_that_changes_the_size_of_an_element_is_refused(encode: Any) -> None:
    with pytest.raises(LayoutError, match="changes the size of an element"):
        OpaqueLayout(encode, lambda x: x.view(torch.uint8)).bind((4, 4), torch.uint8)


def test_two_functions_that_do_not_invert_are_refused() -> None:
    with pytest.raises(LayoutError, match="does not invert"):
        OpaqueLayout(lambda x: x ^ 1, lambda x: x).bind((4, 4), torch.uint8)
    counter = itertools.count(1)

    def padded(value: Tensor) -> Tensor:
        return torch.cat([value, value.new_full((1, 4), next(counter))])

    with pytest.raises(LayoutError, match="other bytes"):
        OpaqueLayout(padded, lambda x: x[:4]).bind((4, 4), torch.uint8)


def test_an_opaque_layout_takes_bools() -> None:
    layout, values = OpaqueLayout(lambda x: x.t().contiguous(), lambda x: x.t().contiguous()), torch.rand(8, 8) > 0.5
    assert torch.equal(layout.bind((8, 8), torch.bool).encode(values), values.t())
