"""Random layouts as plain data, and where their elements go, by loops over digits: nothing here looks at the library."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.int32, torch.float64]


@dataclass(frozen=True)
class Dim:
    """Digits of one dim: ``halves`` equal parts (or None), in each a free digit and the fixed ``tail``; both may be ragged."""

    halves: int | None
    tail: tuple[int, ...]

    def digits(self) -> list[str]:
        return (["h"] if self.halves else []) + ["f"] + [f"t{i}" for i in range(len(self.tail))]

    def text(self, at: int) -> str:
        inner = " ".join(f"{name}{at}" for name in self.digits() if name != "h")
        return f"(h{at} ({inner}))" if self.halves else f"({inner})"

    def capacities(self, extent: int) -> dict[str, int]:
        part = extent // (self.halves or 1)
        sizes = {"f": -(-part // math.prod(self.tail)), **{f"t{i}": size for i, size in enumerate(self.tail)}}
        return {**sizes, "h": self.halves} if self.halves else sizes

    def of(self, x: int, extent: int) -> dict[str, int]:
        """The value of every digit of coordinate x."""
        part = extent // (self.halves or 1)
        values = {"h": x // part} if self.halves else {}
        x %= part
        for i in reversed(range(len(self.tail))):
            values[f"t{i}"], x = x % self.tail[i], x // self.tail[i]
        return {**values, "f": x}


@dataclass(frozen=True)
class Case:
    """A layout as data: dims, the order of all digits on the right, which of them are flipped."""

    dims: tuple[Dim, ...]
    order: tuple[tuple[int, str], ...]
    flipped: frozenset[tuple[int, str]]

    @property
    def text(self) -> str:
        left = " ".join(dim.text(at) for at, dim in enumerate(self.dims))
        right = " ".join(f"{'~' if key in self.flipped else ''}{key[1]}{key[0]}" for key in self.order)
        sizes = [f"h{at}={dim.halves}" for at, dim in enumerate(self.dims) if dim.halves]
        sizes += [f"t{i}{at}={size}" for at, dim in enumerate(self.dims) for i, size in enumerate(dim.tail)]
        return f"{left} -> {right}" + (", " + " ".join(sizes) if sizes else "")

    def capacity(self, shape: tuple[int, ...]) -> int:
        return math.prod(math.prod(dim.capacities(n).values()) for dim, n in zip(self.dims, shape, strict=True))

    def padded(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(math.prod(dim.capacities(n).values()) for dim, n in zip(self.dims, shape, strict=True))

    def position(self, index: tuple[int, ...], shape: tuple[int, ...]) -> int:
        """Kernel position in the region of one element."""
        at = 0
        for key in self.order:
            dim, name = self.dims[key[0]], key[1]
            capacity = dim.capacities(shape[key[0]])[name]
            value = dim.of(index[key[0]], shape[key[0]])[name]
            at = at * capacity + (capacity - 1 - value if key in self.flipped else value)
        return at

    def positions(self, shape: tuple[int, ...]) -> Tensor:
        found = [self.position(index, shape) for index in itertools.product(*map(range, shape))]
        return torch.tensor(found, dtype=torch.int64).view(shape)


@st.composite
def cases(draw: Any, rank: int | None = None, halves: bool = True) -> Case:
    rank = rank or draw(st.integers(1, 3))
    tails = [tuple(draw(st.lists(st.integers(1, 4), max_size=3 - at))) for at in range(rank)]
    dims = tuple(Dim(draw(st.sampled_from([None, None, 2, 3])) if halves else None, tail) for tail in tails)
    keys = [(at, name) for at, dim in enumerate(dims) for name in dim.digits()]
    order = tuple(draw(st.permutations(keys)))
    return Case(dims, order, frozenset(key for key in keys if draw(st.integers(0, 5)) == 0))


@st.composite
def core_shapes(draw: Any, case: Case, largest: int = 9) -> tuple[int, ...]:
    return tuple((dim.halves or 1) * draw(st.integers(0 if largest > 8 else 1, largest)) for dim in case.dims)


@st.composite
def boxes(draw: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    ends = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return tuple((start, stop) for start, stop in ends)


@st.composite
def strided(draw: Any, value: Tensor) -> Tensor:
    """The same values with other strides and another storage offset."""
    kind = draw(st.sampled_from(["contiguous", "reversed dims", "every second", "offset"]))
    bits = value.view(INTEGERS[value.element_size()]) if value.dim() else value
    if kind == "reversed dims":
        bits = bits.permute(*reversed(range(bits.dim()))).contiguous().permute(*reversed(range(bits.dim())))
    elif kind == "every second":
        wide = bits.new_zeros(*bits.shape[:-1], 2 * bits.shape[-1])[..., ::2]
        bits = wide.copy_(bits)
    elif kind == "offset":
        flat = bits.new_zeros(bits.numel() + draw(st.integers(1, 3)))
        bits = flat[flat.numel() - bits.numel() :].view(bits.shape).copy_(bits)
    return bits.view(value.dtype) if value.dim() else value


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random bits, NaN included."""
    raw = torch.randint(1, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(INTEGERS[dtype.itemsize]).squeeze(-1).view(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])
