"""Where a function puts every byte or nibble of its input: it is run on position codes.

[Note: position codes] Unit i of the input (a byte, or a nibble) holds, in run j, digit j of the number i in base 256 (16). One
more run has the digits of run 0 complemented: units that follow it came from the input, units that stay are padding.
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

Function = Callable[[Tensor], Tensor]


class Trace(NamedTuple):
    """``positions``: int64, the input's shape in units (last dim): where each goes. ``kernel_shape``: the result's, in units.

    ``bits``: 4 where the units are nibbles, None where they are elements. ``axes``: positions along each dim from the first unit
    on; None where a position is no sum over dims. Where it is one, agreeing along each dim is agreeing everywhere.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    positions: Tensor
    kernel_shape: tuple[int, ...]
    bits: int | None
    axes: list[Tensor] | None


def trace(function: Function, shape: Sequence[int], dtype: torch.dtype, device: str) -> Trace:
    """Raises a subclass of InferenceError where the function is no permutation of elements or nibbles."""
    run = _Runner(function, tuple(shape), dtype, device)
    try:
        source, kernel = _sources(run, 8)
        whole = _elements(source, dtype.itemsize)
        if whole is None or kernel[-1] % dtype.itemsize:
            source, kernel, size, bits = _halved(source), (*kernel[:-1], 2 * kernel[-1]), 2 * dtype.itemsize, 4
        else:
            source, kernel, size, bits = whole, (*kernel[:-1], kernel[-1] // dtype.itemsize), 1, None
    except ValuesChangeError as change:
        try:
            source, kernel = _sources(run, 4)
        except InferenceError:
            raise change from None
        size, bits = 2 * dtype.itemsize, 4
    units = (*shape[:-1], shape[-1] * size)
    positions = _positions(source, units, run.name)
    found = Trace(run.shape, dtype, positions, kernel, bits, _axes(positions))
    _confirm(run, found)
    return found


class _Runner:
    """The function on raw bytes."""

    def __init__(self, function: Function, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
        self.function, self.shape, self.dtype, self.device = function, shape, dtype, device
        self.name = getattr(function, "__qualname__", repr(function))
        self.nbytes = math.prod(shape) * dtype.itemsize
        if not shape or not self.nbytes:
            raise InferenceError(
                f"nothing can be learned of {self.name} from a tensor without dims or elements", found=list(shape)
            )

    def __call__(self, raw: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Bytes in, bytes out (on the CPU), and the shape of the result in bytes."""
        value = raw.view(self.dtype).view(self.shape).to(self.device, copy=True)
        try:
            with torch.no_grad():
                result = self.function(value)
            found = no_values(result)
            given = raw if found else flat_bytes(result).cpu()
        except Exception as error:
            raise FunctionFailedError(f"{self.name} raised {error!r}", found=f"{self.dtype} {list(self.shape)}") from error
        if found is not None:
            raise FunctionFailedError(f"{self.name} returned no tensor with values", expected="one dense tensor", found=found)
        shape = tuple(result.shape) or (1,)
        return given, (*shape[:-1], shape[-1] * result.element_size())


def _sources(run: _Runner, bits: int) -> tuple[Tensor, tuple[int, ...]]:
    """The input unit that each output unit holds, -1 for padding; and the result's shape in units."""
    per = 8 // bits
    count, base = run.nbytes * per, 1 << bits
    index = torch.arange(count)
    runs = max(math.ceil(math.log(max(count, 2), base) - 1e-9), 1)
    codes = [(index >> bits * j) & base - 1 for j in range(runs)]
    first, shape = _units(run, codes[0], bits)
    if not torch.equal(first, _units(run, codes[0], bits)[0]):
        raise NotDeterministicError(f"{run.name} gives other results for the same input", expected="a function of its input")
    units = [first, *(_units(run, code, bits)[0] for code in (*codes[1:], base - 1 - codes[0]))]
    if len({len(found) for found in units}) > 1:
        raise DependsOnValuesError(f"{run.name} returns other sizes for other values", found=sorted({len(u) for u in units}))
    source, moved = torch.stack([u << bits * j for j, u in enumerate(units[:-1])]).sum(0), units[-1]
    padding = moved == first
    wrong = torch.where(padding, first != 0, (moved != base - 1 - first) | (source >= count))
    if bool(wrong.any()):
        at, unit = int(wrong.nonzero()[0]), "nibble" if bits == 4 else "byte"
        sent = base - 1 - codes[0]
        if torch.equal(moved[moved > 0].sort().values, sent[sent > 0].sort().values):
            raise _elsewhere(run, f"{unit} {at}")
        what = "is constant but not zero" if padding[at] else "was in no input"
        raise ValuesChangeError(
            f"{run.name} changes values: {unit} {at} of its result {what}",
            expected="values that only move",
            remedy="Declare it as a lossy derivation: the source is kept, and the kernel name has memory of its own.",
        )
    return source.masked_fill(padding, -1), (*shape[:-1], shape[-1] * per)


def _units(run: _Runner, codes: Tensor, bits: int) -> tuple[Tensor, tuple[int, ...]]:
    codes = codes.to(torch.uint8)
    raw, shape = run(pack(codes) if bits == 4 else codes)
    return (unpack(raw) if bits == 4 else raw).long(), shape


def _elements(source: Tensor, itemsize: int) -> Tensor | None:
    """Sources of whole elements, or None where bytes move within or between them."""
    if source.numel() % itemsize:
        return None
    groups = source.view(-1, itemsize)
    first = groups[:, 0]
    whole = (groups == first[:, None] + torch.arange(itemsize)).all(1) & (first % itemsize == 0)
    padding = (groups == -1).all(1)
    return (first // itemsize).masked_fill(padding, -1) if bool((whole | padding).all()) else None


def _halved(source: Tensor) -> Tensor:
    """Nibbles of bytes."""
    nibbles = source[:, None] * 2 + torch.arange(2)
    return nibbles.masked_fill(source[:, None] < 0, -1).view(-1)


def _positions(source: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    count = math.prod(shape)
    places = (source >= 0).nonzero().view(-1)
    times = torch.bincount(source[places], minlength=count)
    if bool((times != 1).any()):
        at = int((times != 1).nonzero()[0])
        index = [int(i) for i in torch.unravel_index(torch.tensor(at), shape)]
        raise ElementsLostError(
            f"{name} is no permutation: element {index} is in its result {int(times[at])} times", expected="every element once"
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


def _confirm(run: _Runner, found: Trace) -> None:
    """Random values must take the same places."""
    raw = torch.randint(0, 256, (run.nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    once, _ = run(raw)
    size = run.nbytes // math.prod(run.shape) if found.bits is None else 1
    units = unpack(raw) if found.bits else raw.view(-1, size)
    result = unpack(once) if found.bits else once.view(-1, size)
    expected = torch.zeros_like(result)
    expected[found.positions.view(-1)] = units
    if not torch.equal(result, expected):
        at = int((result != expected).view(result.shape[0], -1).any(1).nonzero()[0])
        raise _elsewhere(run, f"position {at}")


def _elsewhere(run: _Runner, what: str) -> DependsOnValuesError:
    return DependsOnValuesError(f"{run.name} puts other values elsewhere", expected="one order", found=f"{what} differs")
