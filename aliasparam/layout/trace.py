"""Where a function puts every byte or nibble of its input: it is run on position codes.

[Note: position codes] Unit i of the input (a byte, or a nibble) holds, in run j, digit j of the number i in base 256 (16). One
more run has the digits of run 0 complemented: units that follow it came from the input, units that stay are padding. The last
has random units, which must take the same places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import (
    DependsOnValuesError,
    ElementsLostError,
    FunctionFailedError,
    InferenceError,
    NotDeterministicError,
    ValuesChangeError,
)
from ..spec import no_values
from .bound import flat_bytes
from .nibbles import pack, unpack

_REENCODE = "Declare Alias(..., Reencoding(function, output)): the source is kept, and the kernel name has memory of its own."

Function = Callable[[Tensor], Tensor]


class Trace(NamedTuple):
    """``positions``: int64, the input's shape in units (last dim): where each goes. ``kernel_shape``: the result's, in units.

    ``per``: units of an element; 1 where they are elements, else they are nibbles. ``axes``: positions along each dim from the
    first unit on; None where a position is no sum over dims. Where it is one, agreeing along each dim is agreeing everywhere.
    """

    positions: Tensor
    kernel_shape: tuple[int, ...]
    per: int
    axes: list[Tensor] | None

    @property
    def bits(self) -> int | None:
        """As of a layout."""
        return None if self.per == 1 else 4


def trace(function: Function, shape: Sequence[int], dtype: torch.dtype, device: str) -> Trace:
    """Raises a subclass of InferenceError where the function is no permutation of elements or nibbles."""
    run = _Runner(function, tuple(shape), dtype, device)
    size, per = dtype.itemsize, 1
    try:
        source, kernel = _sources(run, 8)
        elements = _elements(source, size) if kernel[-1] % size == 0 else None
        if elements is None:
            elements, per = (source[:, None] * 2 + torch.arange(2)).view(-1), 2 * size
    except ValuesChangeError as change:
        try:
            (elements, kernel), per = _sources(run, 4), 2 * size
        except InferenceError:
            raise change from None
    positions = _positions(elements, (*shape[:-1], shape[-1] * per), run.name)
    return Trace(positions, (*kernel[:-1], kernel[-1] * per // size), per, _axes(positions))


class _Runner:
    """The function on units of 8 or 4 bits."""

    def __init__(self, function: Function, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
        self.function, self.shape, self.dtype, self.device = function, shape, dtype, device
        self.name = getattr(function, "__qualname__", repr(function))
        self.nbytes = math.prod(shape) * dtype.itemsize
        if not shape or not self.nbytes:
            raise InferenceError(
                f"nothing can be learned of {self.name} from a tensor without dims or elements", found=list(shape)
            )

    def __call__(self, units: Tensor, bits: int) -> tuple[Tensor, tuple[int, ...]]:
        """Units in, units out (uint8, on the CPU), and the shape of the result in bytes."""
        units = units.to(torch.uint8)
        value = (pack(units) if bits == 4 else units).view(self.dtype).view(self.shape).to(self.device, copy=True)
        try:
            with torch.no_grad():
                result = self.function(value)
            found = no_values(result)
            raw = units if found else flat_bytes(result).cpu()
        except Exception as error:
            raise FunctionFailedError(f"{self.name} raised {error!r}", found=f"{self.dtype} {list(self.shape)}") from error
        if found is not None:
            raise FunctionFailedError(f"{self.name} returned no tensor with values", expected="one dense tensor", found=found)
        shape = tuple(result.shape) or (1,)
        return unpack(raw) if bits == 4 else raw, (*shape[:-1], shape[-1] * result.element_size())


def _sources(run: _Runner, bits: int) -> tuple[Tensor, tuple[int, ...]]:
    """The input unit that each output unit holds, -1 for padding; and the result's shape in bytes."""
    count, base, unit = run.nbytes * 8 // bits, 1 << bits, "nibble" if bits == 4 else "byte"
    runs = max(math.ceil(math.log(max(count, 2), base) - 1e-9), 1)
    codes = [torch.arange(count) >> bits * j & base - 1 for j in range(runs)]
    sent = base - 1 - codes[0]
    (first, shape), (again, _) = (run(codes[0], bits) for _ in range(2))
    if not torch.equal(first, again):
        raise NotDeterministicError(
            f"{run.name} gives other results for the same input",
            expected="a function of its input",
            remedy="Take out what is random, or kept from call to call.",
        )
    random = torch.randint(base, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    *units, moved, shuffled = first, *(run(code, bits)[0] for code in (*codes[1:], sent, random))
    if len(sizes := {len(found) for found in (*units, moved, shuffled)}) > 1:
        raise DependsOnValuesError(f"{run.name} returns other sizes for other values", found=sorted(sizes), remedy=_REENCODE)
    source = sum((found.long() << bits * j for j, found in enumerate(units)), start=torch.zeros(len(first), dtype=torch.int64))
    padding = moved == first
    wrong = torch.where(padding, source != 0, (moved != base - 1 - first) | (source >= count))
    if not bool(wrong.any()):
        wrong = shuffled != random[source].masked_fill(padding, 0)  # random values must take the same places
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        # Of position codes each value may be there as often as any other, so that a function of values keeps their counts.
        if torch.equal(shuffled[shuffled > 0].sort().values, random[random > 0].sort().values):
            raise DependsOnValuesError(
                f"{run.name} puts other values elsewhere", expected="one order", found=f"{unit} {at} differs", remedy=_REENCODE
            )
        what = "is constant but not zero" if padding[at] and first[at] else "was in no input"
        raise ValuesChangeError(
            f"{run.name} changes values: {unit} {at} of its result {what}",
            expected="values that only move",
            remedy=_REENCODE,
        )
    return source.masked_fill(padding, -1), shape


def _elements(source: Tensor, itemsize: int) -> Tensor | None:
    """Sources of whole elements, or None where bytes move within or between them."""
    places = torch.arange(itemsize)
    groups = source.view(-1, itemsize)
    groups = torch.where(groups < 0, places - itemsize, groups)  # so padding is element -1
    first = groups[:, 0]
    whole = torch.equal(groups, first[:, None] + places) and not (first % itemsize).any()
    return first // itemsize if whole else None


def _positions(source: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    count = math.prod(shape)
    places = (source >= 0).nonzero().view(-1)
    times = torch.bincount(source[places], minlength=count)
    if bool((times != 1).any()):
        at = int((times != 1).nonzero()[0])
        index = [int(i) for i in torch.unravel_index(torch.tensor(at), shape)]
        raise ElementsLostError(
            f"{name} is no permutation: element {index} is in its result {int(times[at])} times",
            expected="every element once",
            remedy=_REENCODE,
        )
    positions = torch.empty(count, dtype=torch.int64)
    positions[source[places]] = places
    return positions.view(shape)


def _axes(positions: Tensor) -> list[Tensor] | None:
    dims = range(positions.dim())
    axes = [positions[tuple(slice(None) if d == dim else 0 for d in dims)] for dim in dims]
    total = positions.reshape(-1)[0] * (1 - len(axes))
    for dim, axis in enumerate(axes):
        total = total + axis.view([-1 if d == dim else 1 for d in dims])
    return axes if torch.equal(total, positions) else None
