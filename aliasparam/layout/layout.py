"""`Layout`: a digit permutation, or several one after the other, as an immutable value."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from html import escape
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import torch

from ..errors import LayoutError
from .bound import BoundLayout
from .boxes import Piece, pieces, row_major, within
from .digits import bind_lines, core_dims
from .index import IndexLayout
from .infer import infer
from .nibbles import NibbleLayout
from .opaque import OpaqueLayout
from .pattern import Line, parse
from .strided import StridedLayout
from .tile import tile_picture
from .trace import Function

#: Characters of a text: its time grows with the square of its digits.
_LONGEST = 4096


def _sizes(shape: Sequence[int]) -> tuple[int, ...]:
    """``shape`` as plain integers. Raises LayoutError where it is none of a tensor."""
    try:
        sizes = tuple(map(operator.index, shape))
    except TypeError:
        sizes = (-1,)
    if min(sizes, default=0) < 0:
        raise LayoutError("this is no shape of a tensor", expected="sizes of 0 or more", found=repr(shape)[:80])
    return sizes


def _spec(shape: Sequence[int], dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    """Both as they are of a tensor. Raises LayoutError where one is not."""
    if not isinstance(dtype, torch.dtype):
        raise LayoutError("a tensor has a torch.dtype", expected="a torch.dtype", found=repr(dtype)[:80])
    return _sizes(shape), dtype


@dataclass(frozen=True, init=False, repr=False)
class Layout:
    """Where a kernel has the elements of a checkpoint tensor: ``Layout("(g b a) k -> g a b k", a=4, b=8)``.

    Left: a digit, or digits in parentheses, for each of the last dims; dims before them number regions (experts). Right: the same
    digits in the order of kernel memory, outermost first; parentheses there give the kernel dims, without any they are the
    checkpoint's, padded. ``~h`` counts a digit backwards. The first digit of a group may be without a size and may be ragged: the
    memory then has whole tiles, and what no checkpoint element reaches is padding. A group in a group is padded for itself.
    Lines joined by `` | `` apply one after the other.

    ``bits=4``: the last dim counts nibbles, low nibble first.

    Equality is by canonical form: names do not matter, digits that stay together are one.

    Raises:
        LayoutError: the text does not parse.
    """

    lines: tuple[Line, ...]
    bits: int | None
    _hash: int = field(compare=False)

    def __init__(self, text: str, **sizes: int) -> None:
        if not isinstance(text, str) or len(text) > _LONGEST:
            expected = f'text such as "(g b a) k -> g a b k, a=4 b=8", of at most {_LONGEST} characters'
            raise LayoutError("a layout is a line of text", expected=expected, found=repr(text)[:80])
        for name, size in sizes.items():
            if type(size) is not int:
                raise LayoutError(f"the size of digit {name} is no positive integer", found=repr(size)[:80])
        try:
            self._set(*parse(text, tuple(sorted(sizes.items()))))
        except LayoutError as error:
            raise error.located(
                remedy="Write each digit once on both sides, then the sizes: (g b a) k -> g a b k, a=4 b=8."
            ) from None

    def _set(self, lines: Iterable[Line], bits: int | None) -> Layout:
        if bits not in (None, 4):
            raise LayoutError("elements are whole, or of 4 bits", expected="bits=4, or none given", found=bits)
        key = tuple(lines), bits
        self.__dict__.update(lines=key[0], bits=bits, _hash=hash(key))  # every look for what is bound hashes it
        return self

    def __hash__(self) -> int:
        return self._hash

    @classmethod
    def of(cls, lines: Iterable[Line], bits: int | None = None) -> Layout:
        """The layout of parsed lines."""
        return cls.__new__(cls)._set(lines, bits)

    @classmethod
    def identity(cls, dims: int) -> Layout:
        """Kernel order is checkpoint order, over the last ``dims`` dims."""
        names = " ".join(f"d{i}" for i in range(dims))
        return cls(f"{names} -> {names}")

    def __reduce__(self) -> tuple[Any, ...]:
        return Layout, (str(self),)

    def __str__(self) -> str:
        lines = " | ".join(map(str, self.lines))
        return f"{lines}{' ' if '=' in str(self.lines[-1]) else ', '}bits={self.bits}" if self.bits else lines

    def __repr__(self) -> str:
        return f'Layout("{self}")'

    def _repr_html_(self) -> str:
        """The line, and its tile coloured by source row, of a bounded size."""
        return tile_picture(str(self), self.lines) or f"<code>{escape(str(self))}</code>"

    @property
    def core_dims(self) -> int:
        """How many of the last dims the layout orders."""
        return core_dims(self.lines)

    @classmethod
    def infer(cls, function: Function, shape: Sequence[int], dtype: torch.dtype, device: str = "cpu") -> Layout | IndexLayout:
        """The layout that ``function`` applies to a tensor of ``shape`` and ``dtype``: an IndexLayout where no digits say it.

        ``function`` takes one tensor on ``device`` and returns one, of any shape and of the same bytes, padded or not. It is also
        tried on a few other shapes, to tell digits of a fixed size from the free one; those that it refuses do not count.

        Raises:
            InferenceError: one of its subclasses says why the function is no layout, with the first place that shows it.
        """
        found = infer(function, *_spec(shape, dtype), device)
        return found if isinstance(found, IndexLayout) else cls.of(*found)

    def inverse(self) -> Layout:
        """From kernel order, padding included, to padded checkpoint order.

        Raises LayoutError where a kernel dim has two free digits.
        """
        return Layout.of((line.exchanged() for line in reversed(self.lines)), self.bits)

    def then(self, other: Layout | str) -> Layout:
        """This order, then ``other`` of the result: a layout, or its line. Raises LayoutError where it is neither."""
        if not isinstance(other, Layout):
            other = Layout(other)
        if self.bits != other.bits:
            raise LayoutError("layouts of other element widths do not follow one another", expected=self.bits, found=other.bits)
        return Layout.of((*self.lines, *other.lines), self.bits)

    def bind(self, shape: Sequence[int], dtype: torch.dtype) -> BoundLayout:
        """This layout for tensors of the full ``shape``. Raises LayoutError where the digits do not fit."""
        return _bound(self, *_spec(shape, dtype))

    def kernel_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape in kernel format of a tensor of ``shape``, lead dims in front. ``bits=4``: both count nibbles."""
        return bind_lines(self.lines, _sizes(shape))[-1].kernel_shape

    def capacity(self, shape: Sequence[int]) -> int:
        """Elements of one region, padding included."""
        return math.prod(self.kernel_shape(shape)[max(len(shape) - self.core_dims, 0) :])

    def boxes(self, rows: tuple[int, int], columns: tuple[int, int], shape: Sequence[int]) -> list[Piece]:
        """The strided pieces of kernel memory that hold a rectangle (start, stop each) of a matrix of ``shape``, contiguous.

        Raises:
            LayoutError: the matrix has no such rectangle.
        """
        shape, box = _sizes(shape), (rows, columns)
        if not within(box, shape):
            expected = "(start, stop) within each dim of a matrix"
            raise LayoutError(
                "this is no rectangle of the matrix", expected=expected, found=f"{rows}, {columns} of {list(shape)}"
            )
        return pieces(bind_lines(self.lines, shape), shape, box, row_major(shape))


@lru_cache(maxsize=4096)
def _bound(layout: Layout, shape: tuple[int, ...], dtype: torch.dtype) -> BoundLayout:
    lead = len(shape) - layout.core_dims
    if layout.bits is None:
        return StridedLayout(bind_lines(layout.lines, shape), shape, lead, dtype)
    nibbles = (*shape[:-1], shape[-1] * 2 * dtype.itemsize) if shape else ()
    core = nibbles[max(lead, 0) :]
    return NibbleLayout(StridedLayout(bind_lines(layout.lines, core), core, 0, torch.uint8), shape, lead, dtype)


#: Every kind of layout.
Order: TypeAlias = Layout | IndexLayout | OpaqueLayout
_identity = lru_cache(Layout.identity)
#: While somebody has them: tables and functions are kept by nothing else.
_in_use: WeakValueDictionary[tuple[Order, tuple[int, ...], torch.dtype], BoundLayout] = WeakValueDictionary()


def bound_to(layout: Order | None, shape: tuple[int, ...], dtype: torch.dtype) -> BoundLayout:
    """``layout`` for one checkpoint tensor; None is checkpoint order, the whole tensor as one region.

    The same object for equal arguments, so storages of one layout and shape share what is kept with it.
    """
    key = (_identity(len(shape)) if layout is None else layout, shape, dtype)
    found = _in_use.get(key)
    if found is None:
        found = _in_use[key] = key[0].bind(shape, dtype)
    return found
