"""Hypothesis strategies: layout lines, and modules that declare them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from .. import Alias, Derivation, Keep, Reencoding, TensorSpec, declare

#: Element types that checkpoints have, of one to eight bytes.
DTYPES = (torch.uint8, torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.int32, torch.float32, torch.complex64)
_SAME_WIDTH = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def dtypes() -> st.SearchStrategy[torch.dtype]:
    """Element types of checkpoint tensors."""
    return st.sampled_from(DTYPES)


@dataclass(frozen=True)
class DimDigits:
    """Digits of one dim: a free one, ragged, before the fixed ``tail``; within ``parts`` parts, each padded for itself."""

    parts: int
    tail: tuple[int, ...]

    def names(self, dim: int) -> list[str]:
        inner = [f"f{dim}", *(f"t{dim}{i}" for i in range(len(self.tail)))]
        return [f"p{dim}", *inner] if self.parts > 1 else inner

    def text(self, dim: int) -> str:
        names = self.names(dim)
        return f"({names[0]} ({' '.join(names[1:])}))" if self.parts > 1 else f"({' '.join(names)})"

    def sizes(self, dim: int) -> dict[str, int]:
        tail = {f"t{dim}{i}": size for i, size in enumerate(self.tail)}
        return {f"p{dim}": self.parts, **tail} if self.parts > 1 else tail


@st.composite
def lines(draw: st.DrawFn, dims: int, *, parts: bool = True) -> str:
    """Lines over the last ``dims`` dims: digits in any order, some backwards, with ragged ends, halves padded for themselves, and
    sometimes kernel dims of their own. Extents must be even where ``parts``."""
    halves = st.sampled_from([1, 1, 2]) if parts else st.just(1)
    digits = [DimDigits(draw(halves), tuple(draw(st.lists(st.integers(1, 4), max_size=2)))) for _ in range(dims)]
    names = draw(st.permutations([name for dim, each in enumerate(digits) for name in each.names(dim)]))
    backwards = draw(st.sets(st.sampled_from(names), max_size=2))
    right = [f"~{name}" if name in backwards else name for name in names]
    cut = draw(st.none() | st.integers(1, len(right)))
    text = " ".join(right) if cut is None else f"({' '.join(right[:cut])}) " + " ".join(f"({name})" for name in right[cut:])
    sizes = {name: size for dim, each in enumerate(digits) for name, size in each.sizes(dim).items()}
    given = " ".join(f"{name}={size}" for name, size in sizes.items())
    return f"{' '.join(each.text(dim) for dim, each in enumerate(digits))} -> {text.strip()}{', ' if given else ''}{given}"


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    """Vectors and matrices with even extents, and stacks of up to four of them (experts)."""
    even = st.integers(1, 5).map(lambda n: 2 * n)
    one = st.integers(1, 4)
    return st.one_of(
        st.tuples(even), st.tuples(even, even), st.tuples(one, even, even), st.tuples(st.integers(1, 2), one, even, even)
    )


@dataclass(frozen=True)
class LayerPlan:
    """A small declared layer, described so that it can be made many times.

    ``weight`` -> ``weight_prepared`` by ``line``; ``scale`` f32 -> ``scale_e8`` u8 by a re-encoding; ``scale`` -> ``alpha`` ->
    ``alpha_inv``; ``zero`` is kept.
    """

    shape: tuple[int, ...]
    line: str | None
    dtype: torch.dtype = torch.uint8
    kernel_dtype: torch.dtype | None = None
    room_for: tuple[str | None, ...] = ()
    partitions: int = 2

    def make(self, device: str | torch.device = "cpu", *, loaded: bool = False, aliasing: bool = True) -> nn.Module:
        """The module, with zeros under its checkpoint names."""
        layer = _Layer()
        specs = {
            "weight": TensorSpec(self.shape, self.dtype),
            "scale": TensorSpec((self.partitions, 3), torch.float32),
            "zero": TensorSpec((), torch.float32),
        }
        for name, spec in specs.items():
            value = torch.zeros(spec.shape, dtype=spec.dtype, device=device)
            layer.register_parameter(name, nn.Parameter(value, requires_grad=False))
        declare(
            layer,
            Alias("weight", "weight_prepared", self.line, room_for=self.room_for, dtype=self.kernel_dtype),
            Alias("scale", "scale_e8", Reencoding(exponents, one_byte_each)),
            Keep("zero"),
            Derivation("alpha_inv", ("alpha",), torch.reciprocal, (1,), torch.float32),
            Derivation("alpha", ("scale", "zero"), _largest, (1,), torch.float32),
            loaded=loaded,
            aliasing=aliasing,
        )
        return layer

    def make_empty(self, device: str, aliasing: bool) -> nn.Module:
        """As :meth:`make`, in the form the state machine asks for."""
        return self.make(device, aliasing=aliasing)


class _Layer(nn.Module):
    def forward(self) -> tuple[Tensor, ...]:
        """The kernel names, as a kernel would read them."""
        return tuple(self.get_buffer(name).clone() for name in ("weight_prepared", "scale_e8", "alpha", "alpha_inv"))


def exponents(scale: Tensor) -> Tensor:
    """The exponent byte of each f32 (UE8M0, rounded down)."""
    return (scale.view(torch.int32) >> 23 & 0xFF).to(torch.uint8)


def one_byte_each(spec: TensorSpec) -> TensorSpec:
    return TensorSpec(spec.shape, torch.uint8)


def _largest(scale: Tensor, zero: Tensor) -> Tensor:
    return scale.max().reshape(1) + zero


@st.composite
def layers(draw: st.DrawFn) -> LayerPlan:
    """Layers with one aliased weight in a random order, a re-encoded scale, and a chain of two derivations."""
    shape, dtype = draw(shapes()), draw(dtypes())
    dims = draw(st.integers(1, min(2, len(shape))))
    line = draw(st.none() | lines(dims) if len(shape) <= 2 else lines(dims))
    kernel = draw(st.sampled_from([None, _SAME_WIDTH[dtype.itemsize]]))
    room = draw(st.lists(lines(dims), max_size=1)) if line is not None else []
    return LayerPlan(shape, line, dtype, kernel, tuple(room), draw(st.integers(1, 3)))


#: Makes a declared, empty module: ``make(device, aliasing)``.
Make = Callable[[str, bool], nn.Module]
