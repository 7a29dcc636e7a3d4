"""Law 11: reading gives what was written, in kernel memory every element is where its digits say, and layouts compose."""

from __future__ import annotations

import itertools
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aliasparam.layout import Layout
from aliasparam.layout.blocks import tiles

from .layout_oracle import DTYPES, Case, bits, boxes, cases, core_shapes, random, strided

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


#: Whose halves and thirds of 36 or 6 rows straddle one another.
ROWS = (
    "(h r) k -> ~h r k, h=2",
    "(h r) k -> r h k, h=2",
    "(g a) k -> a g k, a=3",
    "(g a) k -> g ~a k, a=2",
    "(g a) k -> a g k, a=6",
)


@pytest.mark.parametrize("rows", [0, 6, 36])
def test_a_layout_is_the_identity_where_every_element_is_at_its_place(rows: int) -> None:
    """Also where lines undo one another that are no one line."""
    found = set()
    for first, second in itertools.product(map(Layout, ROWS), repeat=2):
        both = first.then(second)
        for layout in (first, both, both.then(both.inverse())):
            bound = layout.bind((2, rows, 2), torch.uint8)
            keeps = torch.equal(bound.offsets().flatten(), torch.arange(2 * rows * 2))
            assert bound.is_identity == keeps, layout
            found.add((keeps, len(getattr(bound, "lines", ())) > 1))
    assert found >= ({(True, True), (False, True), (False, False)} if rows else {(True, False)})


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

    assert a.then(b).then(c) == a.then(b.then(c)) == Layout(str(a.then(b).then(c))) == a.then(str(b.then(c)))
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

    old.reorder(memory, new, 5)

    assert torch.equal(memory, expected)


@pytest.mark.parametrize(
    ("before", "after", "shape"),
    [
        ("(h (f t)) -> t h f, h=2 t=4", "(f t) -> t f, t=4", (14,)),  # a ragged end within the dim
        ("(h (f t)) -> f h t, h=2 t=2", "(f t) -> f t, t=4", (6,)),
        ("r (h (f t)) -> r f h t, h=2 t=2", "(q p) c -> q p c, p=2", (3, 6)),
        ("(r a) k -> k r a, a=2", "(r t) (k c) -> r k c t, t=3 c=2", (9, 9)),  # three of ten rows are no cell of the ten
        ("r k -> (r k) | (a b) -> b a, b=4", "r k -> (r k) | (a b c) -> c b a, b=2 c=2", (4, 10)),  # fours go on to the next row
        ("(h f t) -> f h t, t=2 h=3 | (h (r t)) -> h r t, h=2 t=9", "(h (f t u)) -> u h f t, h=3 t=2 u=3", (12,)),
    ],
)
def test_ragged_digits_move_in_place(before: str, after: str, shape: tuple[int, ...]) -> None:
    old, new = (Layout(text).bind(shape, torch.uint8) for text in (before, after))
    value, memory = random(shape, torch.uint8), torch.zeros(old.region_capacity, dtype=torch.uint8)
    old.write(memory, old.whole, value)

    for block in old.in_place_blocks(new, 1):
        parts = [old.read(memory, box) for box in block]
        for box, part in zip(block, parts, strict=True):
            new.write(memory, box, part)

    assert old.region_capacity == new.region_capacity
    assert torch.equal(new.read(memory, new.whole), value)


def test_digits_that_both_keep_in_place_bound_the_blocks() -> None:
    rows = Layout("(rt r) (ct c4) -> rt r ct c4, r=128 c4=4")
    tiles = Layout("(rt r4 r32) (ct c4) -> rt ct r32 r4 c4, r4=4 r32=32 c4=4")
    old, new = (layout.bind((2, 300, 10), torch.uint8) for layout in (rows, tiles))

    sizes = [sum(math.prod(b - a for a, b in box) for box in block) for block in old.in_place_blocks(new, 400)]

    assert max(sizes) <= 400 and sum(sizes) == 6000


@given(DRAW, st.integers(1, 300))
def test_tiles_tile_the_box(data: Any, limit: int) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 12), max_size=3)))
    box = data.draw(boxes(shape))
    seen = torch.zeros(shape, dtype=torch.int64)

    for tile in tiles(box, limit):
        part = seen[tuple(slice(*ends) for ends in tile)]
        assert 0 < part.numel() <= limit
        part += 1

    seen[tuple(slice(*ends) for ends in box)] -= 1
    assert not seen.any()
