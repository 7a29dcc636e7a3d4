"""Law 11 below the byte and at the edges: nibbles, wide moves, lines that are refused, shapes with nothing in them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aliasparam.layout import IndexLayout, Layout, LayoutError

from .layout_oracle import Case, Dim, bits, boxes, cases, core_shapes, random, strided

DRAW = st.data()
LEADS = st.lists(st.integers(1, 3), max_size=2).map(tuple)


@given(DRAW, cases(), LEADS, st.sampled_from([torch.uint8, torch.int32, torch.int64]))
def test_nibbles_are_where_their_digits_say(data: Any, case: Case, lead: tuple[int, ...], dtype: torch.dtype) -> None:
    many = 2 * dtype.itemsize
    dims = (*case.dims[:-1], Dim(None, (*case.dims[-1].tail, many)))
    word = (len(dims) - 1, f"t{len(dims[-1].tail) - 1}")
    keys = [(at, name) for at, dim in enumerate(dims) for name in dim.digits() if (at, name) != word]
    case = Case(dims, (*data.draw(st.permutations(keys)), word), frozenset())
    core = data.draw(core_shapes(case, 5))
    shape, nibble_core = (*lead, *core), (*core[:-1], core[-1] * many)
    bound = Layout(case.text, bits=4).bind(shape, dtype)
    box = data.draw(boxes(shape))
    value = random(tuple(stop - start for start, stop in box), dtype)
    memory = random((bound.regions * bound.region_capacity,), dtype, seed=1)
    region = torch.arange(bound.regions).view(*lead, *[1] * len(core)) * case.capacity(nibble_core)
    positions = (region + case.positions(nibble_core))[
        tuple(slice(*ends) for ends in (*box[:-1], (box[-1][0] * many, box[-1][1] * many)))
    ]
    expected = by_nibble(memory)
    expected[positions.reshape(-1)] = by_nibble(value)

    bound.write(memory, box, data.draw(strided(value)))

    assert torch.equal(by_nibble(memory), expected)
    with pytest.raises(LayoutError, match="no positions of their own"):
        bound.offsets(box)
    assert torch.equal(bits(bound.read(memory, box)), bits(value))


def by_nibble(words: torch.Tensor) -> torch.Tensor:
    numbers = [word % (1 << 8 * words.element_size()) for word in words.reshape(-1).tolist()]
    return torch.tensor([word >> 4 * i & 15 for word in numbers for i in range(2 * words.element_size())], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("a b", "one arrow"),
        ("a b -> a", "different digits"),
        ("a a -> a", "twice on the left"),
        ("(a b) -> a b", "a and b of one group have no size"),
        ("(a b -> a b", "not closed"),
        ("a b) -> a b", "too many"),
        ("a -> a, a=0", "no positive"),
        ("a -> a, a=2 a=3", "two sizes"),
        ("a -> a, b=2", "lacks"),
        ("a -> a!", "character"),
        ("~ -> a", "unexpected character"),
        ("a -> 2", "unexpected character"),
        ("a b -> [a (b)]", "brackets hold all digits"),
        ("a -> a, bits=3", "4 bits"),
        ("[a] -> a", "say the dims"),
        ("a -> a, a", "do not parse"),
        (None, "line of text"),
        (["a -> a"], "line of text"),
        (" | ".join(["a b -> b a"] * 3000), "of at most 4096 characters"),  # would take minutes
        (f"(a b) -> b a, a={'9' * 5000}", "of at most 4096 characters"),
        (f"{'(' * 900}a{')' * 900} k -> k a", "nested too deep"),
    ],
)
def test_a_line_that_does_not_parse_is_refused(text: Any, error: str) -> None:
    with pytest.raises(LayoutError, match=error):
        Layout(text)


@pytest.mark.parametrize(
    ("rows", "columns", "shape"),
    [
        ((0, 65), (0, 4), (64, 4)),
        ((-3, 3), (0, 4), (64, 4)),
        ((5, 3), (0, 4), (64, 4)),
        ((0, 3), (0, 5), (64, 4)),
        ((0, 3), (0, 4), (64,)),
    ],
)
def test_what_is_no_rectangle_has_no_pieces(rows: Any, columns: Any, shape: Any) -> None:
    with pytest.raises(LayoutError, match="no rectangle of the matrix"):
        Layout("(g b a) k -> g a b k, a=4 b=8").boxes(rows, columns, shape)


def test_a_rectangle_of_regions_is_in_the_memory_of_each() -> None:
    assert [piece.kernel for piece in Layout("k -> ~k").boxes((1, 2), (0, 4), (3, 4))] == [7]


@pytest.mark.parametrize("size", [[2], "2", 2.0, None, True, -1])
def test_sizes_that_are_no_positive_integers_are_refused(size: Any) -> None:
    with pytest.raises(LayoutError, match="size of digit a is no positive integer"):
        Layout("(g a) -> a g", a=size)


@pytest.mark.parametrize("shape", [(8, -4), (8.0, 4), ("8", 4), 8, None])
@pytest.mark.parametrize("use", [lambda line, s: line.bind(s, torch.uint8), Layout.kernel_shape, Layout.capacity])
def test_what_is_no_shape_is_refused(shape: Any, use: Any) -> None:
    with pytest.raises(LayoutError, match="no shape of a tensor"):
        use(Layout("(g a) k -> a g k, a=4"), shape)


@pytest.mark.parametrize(
    ("text", "shape", "error", "expected"),
    [
        ("(h i a) k -> i h a k, h=2 a=8", (24, 4), r"\(h i a\).*h=2 a=8.*24, dim 0", "a multiple of 16"),
        ("(h a) k -> a h k, h=2 a=8", (24, 4), "do not fit 24", "16"),
        ("(g a) k -> g a k, a=8", (24,), "takes 2 dims", "2 or more dims"),
        ("k (a n) -> (k n) a, a=4, bits=4", (2, 8), "whole torch.int32", "a multiple of 8 nibbles"),
    ],
)
def test_digits_that_do_not_fit_say_what_would(text: str, shape: tuple[int, ...], error: str, expected: str) -> None:
    with pytest.raises(LayoutError, match=error) as caught:
        Layout(text).bind(shape, torch.int32)

    assert caught.value.expected == expected


def test_what_does_not_fit_the_box_changes_nothing() -> None:
    bound = Layout("(g b a) k -> g a b k, a=4 b=8").bind((2, 32, 6), torch.int32)
    memory = torch.zeros(2 * 32 * 6, dtype=torch.int32)
    ones = torch.ones(2, 4, 6, dtype=torch.int32)

    for box, value in [
        (((0, 2), (30, 34), (0, 6)), ones),
        (((0, 2), (0, 4)), ones),
        (((0, 2), (0, 4), (0, 6)), ones[:1]),
        (((0, 2), (0, 4), (0, 6)), ones.float()),
        (((1, 3), (0, 4), (0, 6)), ones),
    ]:
        with pytest.raises(LayoutError):
            bound.write(memory, box, value)
    with pytest.raises(LayoutError):
        bound.write(memory[1:], ((0, 2), (0, 4), (0, 6)), ones)
    assert not memory.any()


@given(st.data(), st.integers(1, 5), st.integers(1, 40), st.sampled_from([torch.uint8, torch.bfloat16]))
def test_elements_are_moved_wide_only_where_all_is_aligned(data: Any, blocks: int, columns: int, dtype: torch.dtype) -> None:
    """Runs of 8 elements, cut anywhere, from values at odd addresses with odd strides, into memory at odd addresses."""
    layout, shape, tiles = Layout("(g b a) (k c) -> g k a b c, a=2 b=2 c=8"), (4 * blocks, columns), -(-columns // 8)
    bound, value = layout.bind(shape, dtype), random(shape, dtype)
    memory = random((bound.region_capacity + 16,), dtype, seed=1)[data.draw(st.sampled_from([0, 0, 0, 1, 2, 4, 8])) :][
        : bound.region_capacity
    ]
    row, column = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    at = ((row // 4 * tiles + column // 8) * 4 + row % 2 * 2 + row // 2 % 2) * 8 + column % 8
    box = data.draw(st.one_of(st.just(bound.whole), boxes(shape)))
    inside = tuple(slice(*ends) for ends in box)
    expected = bits(memory).clone()
    expected[at[inside].reshape(-1)] = bits(value[inside]).reshape(-1)

    bound.write(memory, box, data.draw(strided(value[inside])))

    assert torch.equal(bits(memory), expected)
    assert torch.equal(bits(bound.read(memory, box)), bits(value[inside]))


@given(DRAW, LEADS, st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.complex64, torch.complex128]))
def test_a_table_puts_every_element_where_it_says(data: Any, lead: tuple[int, ...], dtype: torch.dtype) -> None:
    core = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple))
    room = math.prod(core) + data.draw(st.integers(0, 3))
    positions = torch.tensor(data.draw(st.permutations(range(room)))[: math.prod(core)]).view(core)
    shape, regions = (*lead, *core), math.prod(lead)
    bound = IndexLayout(positions, (room,)).bind(shape, dtype)
    box = data.draw(boxes(shape))
    value = numbers([stop - start for start, stop in box], dtype, 1)
    memory = numbers([regions * room], dtype, 100)
    at = (torch.arange(regions).view(*lead, *[1] * len(core)) * room + positions)[tuple(slice(*ends) for ends in box)]
    expected = memory.clone()
    expected[at.reshape(-1)] = value.reshape(-1)

    bound.write(memory, box, value)

    assert torch.equal(memory, expected)
    assert torch.equal(bound.offsets(box), at)
    assert torch.equal(bound.read(memory, box), value)


def numbers(shape: list[int], dtype: torch.dtype, first: int) -> torch.Tensor:
    return torch.arange(first, first + math.prod(shape)).to(dtype).view(shape)


def test_conjugated_and_negated_values_are_what_they_look_like() -> None:
    bound = Layout("(g a) k -> a g k, a=2").bind((4, 3), torch.complex64)
    value = torch.view_as_complex(torch.arange(24.0).view(4, 3, 2)).conj()
    memory = torch.zeros(12, dtype=torch.complex64)

    bound.write(memory, bound.whole, value)
    out = torch.zeros(4, 3, dtype=torch.complex64).conj()
    bound.read(memory, bound.whole, out)

    assert torch.equal(bound.read(memory, bound.whole), value) and torch.equal(out, value)
    imaginary = Layout("(g a) k -> a g k, a=2").bind((4, 3), torch.float32)
    plain = torch.zeros(12)
    imaginary.write(plain, imaginary.whole, value.imag)  # the negative bit
    assert torch.equal(imaginary.read(plain, imaginary.whole), value.imag)


def test_values_that_require_grad_leave_no_graph_behind() -> None:
    bound, memory = Layout("k n -> n k").bind((2, 3), torch.float32), torch.zeros(6)
    out = torch.zeros(2, 3, requires_grad=True)

    bound.write(memory, bound.whole, torch.ones(2, 3, requires_grad=True))

    assert not memory.requires_grad and not bound.read(memory, bound.whole).requires_grad
    assert bound.read(memory, bound.whole, out).grad_fn is None and bool((out == 1).all())


def test_a_scalar_has_a_layout() -> None:
    bound, memory = Layout.identity(0).bind((), torch.float32), torch.zeros(1)
    bound.write(memory, (), torch.tensor(3.0))
    assert bound.read(memory, ()) == 3 and bound.is_identity and Layout(str(Layout.identity(0))) == Layout.identity(0)


def test_canonical_form_joins_what_stays_together() -> None:
    assert Layout("(g b a) k -> g a b k, a=4 b=8") == Layout("(g b a) (k c d) -> g a b k c d, a=4 b=8 c=1 d=1")
    assert Layout("(g b a c) k -> g a c b k, a=4 b=8 c=2") == Layout("(x y z) k -> x z y k, y=8 z=8")
    assert Layout("(a b) -> ~a ~b, a=2 b=3") == Layout("a -> ~a, a=6") != Layout("(a b) -> ~a b, a=2 b=3")
    assert Layout("(a b) -> ~a b, a=2 b=3") != Layout("a -> a, a=6")
    assert Layout("(g a) k -> g a k, a=4") != Layout("g k -> g k")  # the one pads to fours
    assert Layout("(g a) k -> (g a) (k), a=4") != Layout("(g a) k -> g a k, a=4", bits=4)


def test_a_shape_with_nothing_in_it_is_legal() -> None:
    bound = Layout("(rt r4 r32) (ct c4) -> rt ct r32 r4 c4, r4=4 r32=32 c4=4").bind((0, 256, 0), torch.uint8)
    empty = torch.empty(0, dtype=torch.uint8)

    bound.write(empty, bound.whole, torch.empty(0, 256, 0, dtype=torch.uint8))
    assert bound.read(empty, bound.whole).shape == (0, 256, 0) and bound.region_capacity == 0
    padded, other = (Layout(f"(r t) k -> {order}, t=2").bind((0, 3, 5), torch.uint8) for order in ("r t k", "t k r"))
    padded.reorder(empty, other, 1)
    both = Layout("(r t) k -> r t k, t=2").then("(r t) k -> ~r k t, t=3").bind((0, 3, 5), torch.uint8)
    assert both.offsets().shape == (0, 3, 5) and both.kernel_shape == (0, 6, 5)
