"""Coverage is exact: against a boolean array that marks every element."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from aliasparam.errors import ReloadError
from aliasparam.storage.coverage import Box, Coverage


@st.composite
def shapes_and_boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    dims = [st.lists(st.integers(0, size), min_size=2, max_size=2).map(sorted).map(tuple) for size in shape]
    whole = [st.just((0, size)) for size in shape]
    dim = [st.one_of(any_part, all_of_it) for any_part, all_of_it in zip(dims, whole, strict=True)]
    return shape, draw(st.lists(st.tuples(*dim), max_size=24))


def marked(shape: tuple[int, ...], boxes: list[Box]) -> Tensor:
    marks = torch.zeros(shape, dtype=torch.int64)
    for box in boxes:
        part(marks, box).add_(1)
    return marks


def part(marks: Tensor, box: Box) -> Tensor:
    return marks[tuple(slice(*dim) for dim in box)]


@given(shapes_and_boxes())
@example(((), [(), ()]))
@example(((3, 2, 2), [((0, 3), (0, 2), (0, 1)), ((1, 2), (0, 2), (0, 2)), ((0, 1), (0, 1), (0, 2))]))  # a run cut in two
@example(((3, 3, 4), [((0, 3), (0, 3), (0, 1)), ((1, 2), (0, 3), (0, 4)), ((0, 1), (0, 3), (2, 3))]))  # and one of its runs
@example(((3, 4), [((0, 2), (1, 3)), ((1, 2), (0, 4)), ((0, 3), (2, 3)), ((0, 3), (0, 4))]))
def test_a_union_of_boxes_in_any_order_is_exact(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = case
    coverage, marks = Coverage(shape), marked(shape, [])
    for box in boxes:
        here = part(marks, box)
        met, covered = bool(here.any()), bool(here.all())
        assert coverage.covers(box) == covered
        found = coverage.overlap(box)
        assert (found is not None) == met
        if found is not None:
            assert part(marks, found).all() and part(marked(shape, [box]), found).all() and part(marks, found).numel()
        assert coverage.add(box) == (not met)
        here.fill_(1)
        assert coverage.whole == bool(marks.all())
    missing = marked(shape, coverage.missing())
    assert torch.equal(missing, 1 - marks)  # exactly once each, too
    order = Coverage(shape)
    for box in reversed(boxes):
        order.add(box)
    assert order.missing() == coverage.missing()


def test_a_box_of_lists_is_the_box() -> None:
    coverage = Coverage((4, 3))
    assert coverage.add([[0, 4], [0, 3]]) and coverage.whole  # type: ignore[arg-type]


def test_0d_and_one_element_are_one_thing() -> None:
    for shape in ((), (1,)):
        for box in ((), ((0, 1),)):
            coverage = Coverage(shape)
            assert coverage.missing() == [() if shape == () else ((0, 1),)]
            assert coverage.add(box) and coverage.whole and coverage.covers(box) and not coverage.add(box)
            assert coverage.overlap(box) is not None and coverage.missing() == []


def test_a_tensor_without_elements_is_whole_and_empty() -> None:
    coverage = Coverage((0, 3))
    assert coverage.whole and coverage.missing() == [] and coverage.add(((0, 0), (0, 3)))


BAD: list[object] = [
    ((0, 5), (0, 3)),
    ((-1, 2), (0, 3)),
    ((3, 2), (0, 3)),
    ((0, 4),),
    ((0, 4), (0, 3), (0, 1)),
    (),
    7,
    ((0, 1.5), (0, 3)),
    (4, 3),
    None,
    ((0.0, 1.0), (0, 3)),
    (1, (0, 3)),
]


@pytest.mark.parametrize("box", BAD, ids=repr)
def test_a_box_that_is_not_within_the_tensor_is_refused(box: Box) -> None:
    coverage = Coverage((4, 3))
    coverage.add(((0, 1), (0, 3)))
    for ask in (coverage.add, coverage.covers, coverage.overlap):
        with pytest.raises(ReloadError, match=r"not in the tensor\n  expected: .* each dim of \[4, 3\]"):
            ask(box)
    assert coverage.missing() == [((1, 4), (0, 3))]


def test_a_box_may_be_an_array() -> None:
    coverage = Coverage((4, 3))
    assert coverage.add(np.array([[0, 2], [0, 3]])) and coverage.add(torch.tensor([[2, 4], [0, 3]]))  # type: ignore[arg-type]
    assert coverage.whole


def rows(count: int) -> list[Box]:
    return [((i, i + 1), (0, 8)) for i in range(count)]


def shuffled(boxes: list[Box]) -> list[Box]:
    return random.Random(0).sample(boxes, len(boxes))


ORDERS = {
    "rows": rows,
    "rows from the end": lambda n: rows(n)[::-1],
    "rows shuffled": lambda n: shuffled(rows(n)),
    "columns shuffled": lambda n: shuffled([((0, n), (i, i + 1)) for i in range(n)]),
    "every other row, then the rest": lambda n: rows(n)[::2] + rows(n)[1::2],
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_cost_of_a_box_hardly_grows_with_their_number(order: str) -> None:
    def seconds(count: int) -> float:
        boxes = ORDERS[order](count)
        coverage = Coverage((count, 8) if order.startswith(("rows", "every")) else (count, count))
        start = time.process_time()
        for box in boxes:
            coverage.add(box)
        elapsed = time.process_time() - start
        assert coverage.whole and len(coverage._runs) == 1
        return elapsed / count

    assert seconds(32_000) < 4 * min(seconds(2_000) for _ in range(3))


def test_stripes_both_ways_are_kept_once() -> None:
    """Columns cut by rows share the list of columns: 500 lists of 500 would be 250 000 runs."""
    coverage = Coverage((1000, 1000))
    for i in range(0, 1000, 2):
        coverage.add(((0, 1000), (i, i + 1)))
    for i in range(0, 1000, 2):
        coverage.add(((i, i + 1), (0, 1000)))
    assert len({id(inner) for _, _, inner in coverage._runs}) == 2 and not coverage.covers(((0, 2), (0, 2)))
    assert sum((a - b) * (c - d) for (b, a), (d, c) in coverage.missing()) == 250_000
