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
from .pattern import Line, parse
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
                return found
            if fits > most:
                best, most = found, fits
    return best or IndexLayout(*_core(base, shaped=True), base.bits)


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
    for shaped in (True, False):
        positions, kernel = _core(sample, shaped=shaped)
        axes = (sample.axes or [])[-positions.dim() :]
        yield from ((Found((line,), sample.bits), shaped) for line in _lines(axes, kernel))
        for dim, axis in enumerate(axes):
            if len(axis) % 2 == 0 and sample.bits is None:  # halves exchanged, then tiles that cut them
                names = [f"d{i}" for i in range(len(axes))]
                left, right = (" ".join([*names[:dim], f"({h} {names[dim]})", *names[dim + 1 :]]) for h in ("h", "~h"))
                swap = parse(f"{left} -> {right}, h=2", {})[0]
                exchanged = [*axes[:dim], axis.roll(len(axis) // 2), *axes[dim + 1 :]]
                yield from ((Found((swap, line), None), shaped) for line in _lines(exchanged, kernel))


def _lines(axes: Sequence[Tensor], kernel: tuple[int, ...]) -> Iterator[Line]:
    for dims in itertools.product(*map(ways, axes)) if axes else ():
        for text in lines(dims, kernel):
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
