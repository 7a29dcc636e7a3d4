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
from .factor import texts, ways
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
    best, most = None, 0
    for sample in sorted(samples, key=lambda s: -s.positions.numel()):
        for lines, shaped in itertools.islice(_candidates(sample), _CANDIDATES):
            fits = sum(_fits(lines, other, shaped=shaped) for other in samples) if _fits(lines, base, shaped=shaped) else 0
            if fits == len(samples):
                return lines, base.bits
            if fits > most:
                best, most = lines, fits
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
        axes = (sample.axes or [])[-positions.dim() :]
        yield from ((line, shaped) for line in _lines(axes, kernel))
        for dim, axis in enumerate(axes):
            if len(axis) % 2 == 0 and sample.per == 1:  # halves exchanged, then tiles that cut them
                dims = " ".join(f"(h d{i})" if i == dim else f"d{i}" for i in range(len(axes)))
                swap, _ = parse(f"{dims} -> {dims.replace('h', '~h')}, h=2", {})
                exchanged = [*axes[:dim], axis.roll(len(axis) // 2), *axes[dim + 1 :]]
                yield from (((*swap, *line), shaped) for line in _lines(exchanged, kernel))


def _lines(axes: Sequence[Tensor], kernel: tuple[int, ...]) -> Iterator[tuple[Line, ...]]:
    for dims in itertools.product(*map(ways, axes)) if axes else ():
        for text in texts(dims, kernel):
            with contextlib.suppress(LayoutError):
                yield parse(text, {})[0]


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
    boxes = (tuple((0, n if d == dim else 1) for d, n in enumerate(shape)) for dim in range(len(shape)))
    return all(torch.equal(bound.offsets(box).view(-1), axis) for box, axis in zip(boxes, sample.axes, strict=True))


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
