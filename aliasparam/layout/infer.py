"""A layout from somebody's repack function: it is run on position codes, and the permutation it makes is written in digits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InferenceError, LayoutError
from . import lines as bind
from .factor import factor, lines
from .index import IndexLayout
from .pattern import Digit, Group, Line, Side, parse
from .trace import Function, Trace, trace

#: Bytes of the largest other shape that is tried to tell which digits are free.
_OTHER = 1 << 21
#: Lines tried a shape.
_CANDIDATES = 100


class Found(NamedTuple):
    """Lines one after the other; ``bits``: 4 where they count nibbles."""

    lines: tuple[Line, ...]
    bits: int | None


class _Sample(NamedTuple):
    trace: Trace
    axes: list[Tensor] | None  # positions along each dim; None where the position is no sum over dims
    dtype: torch.dtype


def infer(function: Function, shape: Sequence[int], dtype: torch.dtype, device: str) -> Found | IndexLayout:
    """See :meth:`aliasparam.Layout.infer`."""
    base = _sample(trace(function, shape, dtype, device), dtype)
    samples = [base, *_others(function, tuple(shape), dtype, device)]
    best, most = None, 0
    for sample in sorted(samples, key=lambda s: -s.trace.positions.numel()):
        for found, shaped in itertools.islice(_candidates(sample), _CANDIDATES):
            fits = sum(_fits(found, other, shaped=shaped) for other in samples) if _fits(found, base, shaped=shaped) else 0
            if fits == len(samples):
                return _without_lead(found)
            if fits > most:
                best, most = found, fits
    return _without_lead(best) if best else _table(base.trace)


def _sample(found: Trace, dtype: torch.dtype) -> _Sample:
    return _Sample(found, _axes(found.positions) if factor_sum(found.positions) else None, dtype)


def _others(function: Function, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Iterator[_Sample]:
    small = 9 * math.prod(shape) * dtype.itemsize <= _OTHER
    scales = ((2, 1), (3, 1)) if small else ((1, 2), (1, 4), (3, 4))
    others = [tuple(n * up // down if n * up % down == 0 else n for n in shape) for up, down in scales]
    for other in (*others, tuple(n + 2 * (n > 1) for n in others[-1])):  # the last shows what is padded
        if other != shape:
            try:
                yield _sample(trace(function, other, dtype, device), dtype)
            except InferenceError:
                continue


def _candidates(sample: _Sample) -> Iterator[tuple[Found, bool]]:
    """Layouts that have this sample's digits, and whether their kernel shape is the function's; the most likely first."""
    found = sample.trace
    if sample.axes is None:
        return
    for shaped in (True, False):
        yield from ((line, shaped) for line in _of_positions(found, found.positions))
        for dim, extent in enumerate(found.shape):
            if extent % 2 == 0 and found.bits is None:  # halves exchanged, then tiles that cut them
                names = [f"d{i}" for i in range(len(found.shape))]
                left = " ".join(f"(h {name})" if i == dim else name for i, name in enumerate(names))
                right = " ".join(f"(~h {name})" if i == dim else name for i, name in enumerate(names))
                swap = parse(f"{left} -> {right}, h=2", {})[0]
                for line in _of_positions(found, found.positions.roll(extent // 2, dim)):
                    yield Found((swap, *line.lines), line.bits), shaped


def _of_positions(found: Trace, positions: Tensor) -> Iterator[Found]:
    dims = factor(positions)
    for ways in itertools.product(*dims) if dims else ():
        for text in lines(ways, math.prod(found.kernel_shape), found.kernel_shape):
            try:
                yield Found((parse(text, {})[0],), found.bits)
            except LayoutError:
                continue


def _fits(found: Found, sample: _Sample, *, shaped: bool) -> bool:
    """Whether the lines put every element where the function did; and, ``shaped``, gives the result the same shape."""
    try:
        bound = bind.bound(found.lines, found.bits, sample.trace.shape, sample.dtype)
    except LayoutError:
        return False
    many = 2 * sample.dtype.itemsize if sample.trace.bits else 1
    kernel = (*bound.kernel_shape[:-1], bound.kernel_shape[-1] * many)
    if sample.axes is None or math.prod(kernel) != math.prod(sample.trace.kernel_shape):
        return False
    if shaped and kernel != sample.trace.kernel_shape:
        return False
    for dim, axis in enumerate(sample.axes):
        along = bound.offsets(tuple((0, n) if d == dim else (0, 1) for d, n in enumerate(sample.trace.shape))).view(-1)
        if not torch.equal(along[:: len(along) // len(axis)], axis):  # one of the nibbles of each element
            return False
    return True


def factor_sum(positions: Tensor) -> bool:
    """Whether a position is a sum over dims: then agreeing along each dim is agreeing everywhere."""
    total = positions.reshape(-1)[0] * (1 - positions.dim())
    for dim, axis in enumerate(_axes(positions)):
        total = total + axis.view([-1 if d == dim else 1 for d in range(positions.dim())])
    return torch.equal(total, positions)


def _axes(positions: Tensor) -> list[Tensor]:
    dims = range(positions.dim())
    return [positions[tuple(slice(None) if d == dim else 0 for d in dims)] for dim in dims]


def _without_lead(found: Found) -> Found:
    """Experts are regions, no digits: a first dim that stays outermost is left out."""
    while len(found.lines) == 1 and bind.core_dims(found.lines) > 2:
        (line,) = found.lines
        first, *rest = line.left.dims
        digits = list(line.right.digits())
        alone = len(first.items) == 1 and isinstance(first.items[0], Digit) and first.items[0] == digits[0]
        if not alone or digits[0].name in dict(line.sizes) or not (line.right.flat or line.right.dims[0] == first):
            break
        right = Side((Group(tuple(digits[1:])),), flat=True) if line.right.flat else Side(line.right.dims[1:])
        found = Found((Line(Side(tuple(rest)), right, line.sizes),), found.bits)
    return found


def _table(found: Trace) -> IndexLayout:
    positions, kernel = found.positions, found.kernel_shape
    while positions.dim() > 2 and kernel and kernel[0] == positions.shape[0]:
        room = math.prod(kernel[1:])
        starts = torch.arange(positions.shape[0]).view(-1, *[1] * (positions.dim() - 1)) * room
        if not torch.equal(positions, positions[:1] + starts):
            break
        positions, kernel = positions[0], kernel[1:]
    return IndexLayout(positions, kernel, found.bits)
