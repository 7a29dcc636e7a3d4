"""A layout from somebody's repack function: it is run on position codes, and the permutation it makes is written in digits."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import InferenceError, LayoutError
from ..host import HOST
from .digits import bind_lines, core_dims
from .factor import texts
from .index import IndexLayout
from .pattern import Line, parse
from .strided import StridedLayout
from .trace import Function, Trace, trace

#: Bytes of the largest other shape that is tried to tell which digits are free.
_OTHER = 1 << 21
#: Lines tried a shape.
_CANDIDATES = 100


def infer(
    function: Function, shape: Sequence[int], dtype: torch.dtype, device: str
) -> tuple[tuple[Line, ...], int | None] | IndexLayout:
    """Lines, and the width of elements. See :meth:`aliasparam.Layout.infer`."""
    with HOST:  # what the function makes too, as nothing can be learned of meta
        return _inferred(function, shape, dtype, device)


def _inferred(
    function: Function, shape: Sequence[int], dtype: torch.dtype, device: str
) -> tuple[tuple[Line, ...], int | None] | IndexLayout:
    base = trace(function, shape, dtype, device)
    samples = [base, *(other for other in _others(function, tuple(shape), dtype, device) if other.per == base.per)]
    largest = sorted(samples, key=lambda s: -s.positions.numel())
    best, most = None, 0
    for lines, shaped in itertools.chain(*(itertools.islice(_candidates(sample), _CANDIDATES) for sample in largest)):
        fits = sum(_fits(lines, other, shaped=shaped) for other in samples) if _fits(lines, base, shaped=shaped) else 0
        if fits > most:
            best, most = lines, fits
        if most == len(samples):
            break
    return (best, base.bits) if best else IndexLayout(*_core(base, shaped=True), base.bits)


def _others(function: Function, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Iterator[Trace]:
    small = 9 * math.prod(shape) * dtype.itemsize <= _OTHER
    scales = ((2, 1), (3, 1)) if small else ((1, 2), (1, 4), (3, 4))
    others = [tuple(n * up // down if n * up % down == 0 else n for n in shape) for up, down in scales]
    for other in (*others, tuple(n + 2 * (n > 1) for n in others[-1])):  # the last shows what is padded
        if other != shape:
            with contextlib.suppress(InferenceError):
                yield trace(function, other, dtype, device)


def _candidates(sample: Trace) -> Iterator[tuple[tuple[Line, ...], bool]]:
    """Lines that have this sample's digits, and whether their kernel shape is the function's; the most likely first."""
    for shaped in (True, False):
        positions, kernel = _core(sample, shaped=shaped)
        for text in texts(sample.axes[-positions.dim() :], kernel) if sample.axes else ():
            yield parse(text)[0], shaped


def _fits(lines: tuple[Line, ...], sample: Trace, *, shaped: bool) -> bool:
    """Whether the lines put every unit where the function did; and, ``shaped``, give the result the same shape."""
    shape = tuple(sample.positions.shape)
    try:
        bound = StridedLayout(bind_lines(lines, shape), shape, len(shape) - core_dims(lines), torch.uint8)
    except LayoutError:
        return False
    kernel = bound.kernel_shape
    if sample.axes is None or math.prod(kernel) != math.prod(sample.kernel_shape) or kernel[-1] % sample.per:
        return False
    if shaped and kernel != sample.kernel_shape:
        return False
    along = zip(shape, bound.strides, sample.axes, strict=True)
    return all(torch.equal(bound.positions(torch.arange(n) * step), axis) for n, step, axis in along)


def _core(found: Trace, *, shaped: bool) -> tuple[Tensor, tuple[int, ...]]:
    """Positions and kernel shape of one region: experts whose memory follows one another are regions, no digits.

    ``shaped``: only if they are a kernel dim of their own.
    """
    positions, kernel = found.positions, found.kernel_shape
    while positions.dim() > 2 and kernel and (kernel[0] == len(positions) or not shaped):
        count = len(positions)
        room, rest = divmod(math.prod(kernel), count)
        starts = torch.arange(count).view(-1, *[1] * (positions.dim() - 1)) * room
        if rest or not torch.equal(positions, positions[:1] + starts):
            break
        positions, kernel = positions[0], kernel[1:] if kernel[0] == count else (room,)
    return positions, kernel
