"""A layout from somebody's repack function: it is run on position codes, and the permutation it makes is written in digits."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InferenceError, LayoutError
from . import lines as bind
from .factor import lines, ways
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


def infer(function: Function, shape: Sequence[int], dtype: torch.dtype, device: str) -> Found | IndexLayout:
    """See :meth:`aliasparam.Layout.infer`."""
    base = trace(function, shape, dtype, device)
    samples = [base, *_others(function, tuple(shape), dtype, device)]
    best, most = None, 0
    for sample in sorted(samples, key=lambda s: -s.positions.numel()):
        for found, shaped in itertools.islice(_candidates(sample), _CANDIDATES):
            fits = sum(_fits(found, other, shaped=shaped) for other in samples) if _fits(found, base, shaped=shaped) else 0
            if fits == len(samples):
                return _without_lead(found)
            if fits > most:
                best, most = found, fits
    return _without_lead(best) if best else _table(base)


def _others(function: Function, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Iterator[Trace]:
    small = 9 * math.prod(shape) * dtype.itemsize <= _OTHER
    scales = ((2, 1), (3, 1)) if small else ((1, 2), (1, 4), (3, 4))
    others = [tuple(n * up // down if n * up % down == 0 else n for n in shape) for up, down in scales]
    for other in (*others, tuple(n + 2 * (n > 1) for n in others[-1])):  # the last shows what is padded
        if other != shape:
            with contextlib.suppress(InferenceError):
                yield trace(function, other, dtype, device)


def _candidates(sample: Trace) -> Iterator[tuple[Found, bool]]:
    """Layouts that have this sample's digits, and whether their kernel shape is the function's; the most likely first."""
    axes = sample.axes or []
    for shaped in (True, False):
        yield from ((Found((line,), sample.bits), shaped) for line in _lines(sample, axes))
        for dim, axis in enumerate(axes):
            if len(axis) % 2 == 0 and sample.bits is None:  # halves exchanged, then tiles that cut them
                names = [f"d{i}" for i in range(len(axes))]
                left, right = (" ".join([*names[:dim], f"({h} {names[dim]})", *names[dim + 1 :]]) for h in ("h", "~h"))
                swap = parse(f"{left} -> {right}, h=2", {})[0]
                exchanged = [*axes[:dim], axis.roll(len(axis) // 2), *axes[dim + 1 :]]
                yield from ((Found((swap, line), None), shaped) for line in _lines(sample, exchanged))


def _lines(sample: Trace, axes: Sequence[Tensor]) -> Iterator[Line]:
    for dims in itertools.product(*map(ways, axes)) if axes else ():
        for text in lines(dims, math.prod(sample.kernel_shape), sample.kernel_shape):
            with contextlib.suppress(LayoutError):
                yield parse(text, {})[0]


def _fits(found: Found, sample: Trace, *, shaped: bool) -> bool:
    """Whether the lines put every element where the function did; and, ``shaped``, gives the result the same shape."""
    try:
        bound = bind.bound(found.lines, found.bits, sample.shape, sample.dtype)
    except LayoutError:
        return False
    many = 2 * sample.dtype.itemsize if sample.bits else 1
    kernel = (*bound.kernel_shape[:-1], bound.kernel_shape[-1] * many)
    if sample.axes is None or math.prod(kernel) != math.prod(sample.kernel_shape):
        return False
    if shaped and kernel != sample.kernel_shape:
        return False
    for dim, axis in enumerate(sample.axes):
        along = bound.offsets(tuple((0, n) if d == dim else (0, 1) for d, n in enumerate(sample.shape))).view(-1)
        if not torch.equal(along[:: len(along) // len(axis)], axis):  # one of the nibbles of each element
            return False
    return True


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
