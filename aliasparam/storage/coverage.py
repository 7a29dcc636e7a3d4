"""Which elements of a tensor have arrived: an exact union of boxes, kept as few disjoint ones.

A set of elements is a sorted list of runs along dim 0; each run says which elements of the remaining dims it holds: all
(None), or a list of runs again. Neighbours that hold the same are one run, so rows, columns and tiles in any order end as
one run a dim, and "everything" has one form only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from operator import index as _index
from typing import TypeAlias

from ..errors import ReloadError
from ..layout.boxes import Box as Box
from ..layout.boxes import box_in, whole


class Coverage:
    """The elements of one tensor that have arrived.

    ``shape`` () and [1] are one thing: their boxes are ``()`` or ``((0, 1),)``. Nothing is missing from a tensor without
    elements. Memory is proportional to the number of boxes after neighbours are joined, not to bytes; adding one row costs
    the logarithm of the number of runs. Every change is a single assignment, so an interrupt loses at most the box being added.
    """

    __slots__ = ("_dims", "_runs", "shape")

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(_index(size) for size in shape)
        if any(size < 0 for size in self.shape):
            raise ReloadError("a tensor has no negative size", expected="sizes of 0 or more", found=list(self.shape))
        self._dims = self.shape or (1,)
        self._runs = _Runs()

    def add(self, box: Box) -> bool:
        """Note that the elements of ``box`` have arrived. True if none of them had before.

        Raises:
            ReloadError: the box is not within the tensor. Nothing is noted then.
        """
        checked = self._checked(box)
        return checked is None or self.take(checked)

    def take(self, box: Box) -> bool:
        """:meth:`add` for a box which is known to have elements, and to lie within the tensor."""
        dims, count = self._dims, len(box)
        while count > 1 and box[count - 1] == (0, dims[count - 1]):
            count -= 1
        return self._runs.add(box[:count], dims)

    def overlap(self, box: Box) -> Box | None:
        """Some part of ``box`` that has arrived already, or None. (The part of a 0-d tensor is ``()``: compare with None.)"""
        return next((part for arrived, part in self._parts(box) if arrived), None)

    def covers(self, box: Box) -> bool:
        """Whether all of ``box`` has arrived."""
        return all(arrived for arrived, _ in self._parts(box))

    @property
    def whole(self) -> bool:
        return self._runs.is_all(self._dims[0]) or 0 in self._dims

    def missing(self) -> list[Box]:
        """Disjoint boxes of what has not arrived, in order."""
        return [part for arrived, part in self._parts(whole(self.shape)) if not arrived]

    def __repr__(self) -> str:
        state = "whole" if self.whole else f"{len(self._runs)} runs"
        return f"Coverage({list(self.shape)}: {state})"

    def _parts(self, box: Box) -> Iterator[tuple[bool, Box]]:
        """Disjoint parts of ``box``, in order, and whether each has arrived."""
        checked = self._checked(box)
        found = iter(()) if checked is None else self._runs.parts(checked)
        return found if self.shape else ((arrived, ()) for arrived, _ in found)

    def _checked(self, box: Box) -> Box | None:
        """The box, of a tensor of one dim at least; None where it has no elements. Raises ReloadError for what is none."""
        plain = box_in(((0, 1),) if type(box) is tuple and not box and self._dims == (1,) else box, self._dims)
        if plain is None:
            raise ReloadError(
                "these elements are not in the tensor",
                expected=f"a (start, stop) within each dim of {list(self.shape)}",
                found=repr(box)[:80],
            )
        return None if any(start == stop for start, stop in plain) else plain


_Run: TypeAlias = "tuple[int, int, _Runs | None]"


class _Runs(list["_Run"]):
    """Disjoint runs along one dim, sorted: (start, stop, elements of the further dims), None standing for all of these."""

    __slots__ = ("shared",)

    def __init__(self, runs: Sequence[_Run] = ()) -> None:
        super().__init__(runs)
        #: Another run may hold this list (one was cut in two): whoever changes it makes a copy first.
        self.shared = False

    def is_all(self, size: int) -> bool:
        return len(self) == 1 and self[0] == (0, size, None)

    def add(self, box: Box, dims: tuple[int, ...]) -> bool:
        """Take in a non-empty box whose missing last dims mean everything. True if it was wholly new."""
        low, high = box[0]
        if not self or self[-1][1] < low:  # behind all others: what loaders do
            self.append((low, high, _of(box[1:])))
            return True
        first = last = self._reached(low)
        new, at = True, low
        pieces: list[_Run] = []
        while last < len(self) and self[last][0] < high:
            start, stop, inner = self[last]
            begin, end = max(start, low), min(stop, high)
            if at < begin:
                pieces.append((at, begin, _of(box[1:])))
            if start < begin:
                pieces.append((start, begin, inner))
            fresh, grown = _grown(inner, box[1:], dims[1:], cut=start < begin or end < stop)
            pieces.append((begin, end, grown))
            if end < stop:
                pieces.append((end, stop, inner))
            new, at, last = new and fresh, end, last + 1
        if at < high:
            pieces.append((at, high, _of(box[1:])))
        self._put(first, last, pieces)
        return new

    def _reached(self, low: int) -> int:
        """Index of the first run that ends behind ``low``."""
        index = bisect_left(self, (low,))
        return index - 1 if index and self[index - 1][1] > low else index

    def _put(self, first: int, last: int, pieces: list[_Run]) -> None:
        """``pieces`` in the place of runs ``first`` to ``last``, joined with each other and with their neighbours."""
        if first:
            first -= 1
            pieces.insert(0, self[first])
        if last < len(self):
            pieces.append(self[last])
            last += 1
        joined = [pieces[0]]
        for piece in pieces[1:]:
            start, stop, inner = joined[-1]
            if stop == piece[0] and inner == piece[2]:
                joined[-1] = (start, piece[1], inner)
            else:
                joined.append(piece)
        self[first:last] = joined

    def copy(self) -> _Runs:
        for _, _, inner in self:
            if inner is not None:
                inner.shared = True
        return _Runs(self)

    def parts(self, box: Box) -> Iterator[tuple[bool, Box]]:
        """See :meth:`Coverage._parts`."""
        (at, high), *rest = box
        for index in range(self._reached(at), len(self)):
            start, stop, inner = self[index]
            if start >= high:
                break
            if at < start:
                yield False, ((at, start), *rest)
            run = max(start, at), min(stop, high)
            for arrived, part in [(True, rest)] if inner is None else inner.parts(tuple(rest)):
                yield arrived, (run, *part)
            at = run[1]
        if at < high:
            yield False, ((at, high), *rest)


def _of(box: Box) -> _Runs | None:
    return _Runs([(*box[0], _of(box[1:]))]) if box else None


def _grown(inner: _Runs | None, box: Box, dims: tuple[int, ...], *, cut: bool) -> tuple[bool, _Runs | None]:
    """(whether ``box`` was new, ``inner`` with it). ``cut``: other pieces of its run keep ``inner`` as it is."""
    if inner is None:
        return False, None
    inner.shared |= cut
    if not box:
        return False, None
    own = inner.copy() if inner.shared else inner
    new = own.add(box, dims)
    return new, None if own.is_all(dims[0]) else own
