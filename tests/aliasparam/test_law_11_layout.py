"""Law 11: reading gives what was written, in kernel memory every element is where its digits say, and layouts compose."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aliasparam.layout import Layout, LayoutError

from .layout_oracle import DTYPES, Case, Dim, bits, boxes, cases, core_shapes, random, strided

DRAW = st.data()
LEADS = st.lists(st.integers(1, 3), max_size=2).map(tuple)


@given(DRAW, cases(), LEADS, st.sampled_from(DTYPES))
def test_every_element_is_where_its_digits_say(data: Any, case: Case, lead: tuple[int, ...], dtype: torch.dtype) -> None:
    """Any rectangle, from values of any strides: those elements are written, and no other byte, padding included."""
    core = data.draw(core_shapes(case))
    shape, regions = (*lead, *core), math.prod(lead)
    bound = Layout(case.text).bind(shape, dtype)
    region = torch.arange(regions).view(*lead, *[1] * len(core)) * case.capacity(core)
    positions = region + case.positions(core)
    box = data.draw(boxes(shape))
    inside = tuple(slice(*ends) for ends in box)
    value = random(tuple(stop - start for start, stop in box), dtype)
    memory = random((regions * case.capacity(core),), dtype, seed=1)
    expected = bits(memory).clone()
    expected[positions[inside].reshape(-1)] = bits(value).reshape(-1)

    bound.write(memory, box, data.draw(strided(value)))

    assert (bound.regions, bound.region_capacity) == (regions, case.capacity(core))
    assert bound.kernel_shape == (*lead, *case.padded(core))
    assert torch.equal(bits(memory), expected)
    assert torch.equal(bound.offsets(), positions)
    assert torch.equal(bound.offsets(box), positions[inside])
    assert torch.equal(bits(bound.read(memory, box)), bits(value))
    out = data.draw(strided(torch.zeros_like(bits(value)).view(dtype)))
    assert torch.equal(bits(bound.read(memory, box, out)), bits(value)) and torch.equal(bits(out), bits(value))


@given(DRAW, cases())
def test_a_layout_is_a_value(data: Any, case: Case) -> None:
    layout = Layout(case.text)
    renamed = Layout(case.text.translate(str.maketrans("hft", "xyz")))

    for twin in (Layout(str(layout)), pickle.loads(pickle.dumps(layout)), renamed, layout.inverse().inverse()):
        assert twin == layout and hash(twin) == hash(layout)
    sizes = {(at, f"t{i}"): size for at, dim in enumerate(case.dims) for i, size in enumerate(dim.tail)}
    if any(sizes.get(key) != 1 for key in case.flipped):
        assert Layout(case.text.replace("~", "")) != layout


@given(DRAW, cases())
def test_the_inverse_brings_kernel_memory_back(data: Any, case: Case) -> None:
    core = data.draw(core_shapes(case))
    layout = Layout(case.text)
    there = layout.bind(core, torch.int32)
    value = random(core, torch.int32)
    memory = torch.zeros(there.region_capacity, dtype=torch.int32)
    there.write(memory, there.whole, value)

    back = layout.inverse().bind(there.kernel_shape, torch.int32)
    padded = torch.zeros(back.region_capacity, dtype=torch.int32)
    back.write(padded, back.whole, memory.view(there.kernel_shape))

    # The padded checkpoint tensor, in which every half is padded for itself.
    position = Case(case.dims, tuple((at, n) for at, dim in enumerate(case.dims) for n in dim.digits()), frozenset())
    assert torch.equal(padded[position.positions(core)], value)
    both = layout.then(layout.inverse()).bind(core, torch.int32)
    assert torch.equal(both.offsets(), position.positions(core))


@given(DRAW, st.integers(1, 2))
def test_one_after_the_other(data: Any, rank: int) -> None:
    """``then`` is applying the second to the first's kernel tensor, with whatever cuts they have, and it is associative."""
    first = data.draw(cases(rank))
    others = [data.draw(cases(rank, halves=False)) for _ in range(2)]
    shape = data.draw(core_shapes(first))
    expected, at = first.positions(shape), first.padded(shape)
    for case in others:
        expected = case.positions(at).reshape(-1)[expected] if expected.numel() else expected
        at = case.padded(at)
    a, b, c = (Layout(case.text) for case in (first, *others))
    bound = a.then(b).then(c).bind(shape, torch.uint8)

    assert a.then(b).then(c) == a.then(b.then(c)) == Layout(str(a.then(b).then(c)))
    assert bound.kernel_shape == at
    assert torch.equal(bound.offsets(), expected)
    box, memory = data.draw(boxes(shape)), torch.zeros(bound.region_capacity, dtype=torch.uint8)
    value = random(tuple(stop - start for start, stop in box), torch.uint8)
    bound.write(memory, box, value)
    assert torch.equal(memory[expected[tuple(slice(*ends) for ends in box)]], value)
    assert int((memory != 0).sum()) == value.numel()


@pytest.mark.parametrize(
    ("texts", "shape"),
    [
        (["f -> ~f", "(f t) -> f t, t=2", "f -> ~f"], (1,)),
        (["(h r) k -> ~h r k, h=2", "(t s) k -> t k s, s=2"], (6, 2)),
        (["(h r) k -> h ~r k, h=2", "(t s) k -> ~t k s, s=4"], (6, 3)),
        (["r k -> ~r k", "(t s) k -> t k s, s=2"], (3, 2)),
        (["(h r) k -> r h k, h=3", "(t s) k -> t k ~s, s=9"], (12, 2)),
        (["(a b) -> ~b a, b=3", "(c d) -> ~d c, d=2", "(a b) -> ~b a, b=3"], (7,)),
    ],
)
def test_digits_that_straddle_the_next_line_and_ends_counted_backwards(texts: list[str], shape: tuple[int, ...]) -> None:
    expected, at = torch.arange(math.prod(shape)).view(shape), shape
    for text in texts:
        step = Layout(text).bind(at, torch.uint8)
        expected, at = step.offsets().reshape(-1)[expected], step.kernel_shape
    chain = Layout(" | ".join(texts)).bind(shape, torch.uint8)
    value, memory = random(shape, torch.uint8), torch.zeros(chain.region_capacity, dtype=torch.uint8)

    chain.write(memory, chain.whole, value)

    assert torch.equal(chain.offsets(), expected) and torch.equal(memory[expected], value)


@given(DRAW, cases(halves=False), LEADS, st.integers(1, 200))
def test_blocks_that_both_orders_keep_together(data: Any, case: Case, lead: tuple[int, ...], limit: int) -> None:
    """Block by block from one order to the other in place: nothing is lost, whatever the limit."""
    flipped = data.draw(st.sampled_from([case.flipped, frozenset()]))
    other = Case(case.dims, tuple(data.draw(st.permutations(case.order))), flipped)
    shape = (*lead, *data.draw(core_shapes(case, 8)))
    old, new = (Layout(c.text).bind(shape, torch.int16) for c in (case, other))
    value = random(shape, torch.int16)
    memory = torch.zeros(old.regions * old.region_capacity, dtype=torch.int16)
    old.write(memory, old.whole, value)
    seen = torch.zeros(shape, dtype=torch.int64)

    blocks = list(old.in_place_blocks(new, limit))
    for block in blocks:
        values = [old.read(memory, box) for box in block]
        for box, part in zip(block, values, strict=True):
            seen[tuple(slice(*ends) for ends in box)] += 1
            new.write(memory, box, part)
    new.clear_padding(memory)

    expected = torch.zeros_like(memory)
    new.write(expected, new.whole, value)
    assert torch.equal(memory, expected)
    assert bool((seen == 1).all())


def test_digits_of_other_capacities_are_not_kept_in_place() -> None:
    """The rows have place value 1 in both orders, but after 6 of them the one goes on, after 8 the other."""
    value = random((5, 5), torch.uint8)
    old, new = (Layout(f"(r a) (k c) -> k c r a, a={a} c={6 - a}").bind((5, 5), torch.uint8) for a in (2, 4))
    memory, expected = torch.zeros(48, dtype=torch.uint8), torch.zeros(48, dtype=torch.uint8)
    old.write(memory, old.whole, value)
    new.write(expected, new.whole, value)

    for block in old.in_place_blocks(new, 5):
        parts = [old.read(memory, box) for box in block]
        for box, part in zip(block, parts, strict=True):
            new.write(memory, box, part)
    new.clear_padding(memory)

    assert torch.equal(memory, expected)


def test_digits_that_both_keep_in_place_bound_the_blocks() -> None:
    rows = Layout("(rt r) (ct c4) -> rt r ct c4, r=128 c4=4")
    tiles = Layout("(rt r4 r32) (ct c4) -> rt ct r32 r4 c4, r4=4 r32=32 c4=4")
    old, new = (layout.bind((2, 300, 10), torch.uint8) for layout in (rows, tiles))

    sizes = [sum(math.prod(b - a for a, b in box) for box in block) for block in old.in_place_blocks(new, 400)]

    assert max(sizes) <= 400 and sum(sizes) == 6000


@given(DRAW, cases(), st.integers(1, 300))
def test_pieces_tile_the_tensor(data: Any, case: Case, limit: int) -> None:
    shape = data.draw(core_shapes(case))
    seen = torch.zeros(shape, dtype=torch.int64)

    for box in Layout(case.text).bind(shape, torch.int32).pieces(limit):
        part = seen[tuple(slice(*ends) for ends in box)]
        assert 0 < part.numel() <= max(limit // 4, 1)
        part += 1

    assert bool((seen == 1).all())


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
    assert torch.equal(bound.offsets(box), positions)
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
        ("~ -> a", "names its digits"),
        ("a -> a, bits=3", "4 bits"),
        ("[a] -> a", "say the dims"),
        ("a -> a, a", "do not parse"),
    ],
)
def test_a_line_that_does_not_parse_is_refused(text: str, error: str) -> None:
    with pytest.raises(LayoutError, match=error):
        Layout(text)


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
