"""Hypothesis strategies: transforms, and modules that declare them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from .. import Alias, Derivation, Identity, InterleaveHalves, PadLast2, PermuteRows, SwapHalves, Transform, ViewDtype, declare


@dataclass(frozen=True)
class RollRows(PermuteRows):
    """Rows moved round by ``by``: a permutation that is not an involution."""

    by: int = 1

    def source_rows(self, rows: int) -> Tensor:
        return torch.arange(rows).roll(self.by)


#: Element types that checkpoints of quantized models have.
DTYPES = (torch.uint8, torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.int32)


def dtypes() -> st.SearchStrategy[torch.dtype]:
    """Element types of checkpoint tensors, of one, two and four bytes."""
    return st.sampled_from(DTYPES)


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    """Matrices with an even number of rows, and stacks of up to four of them (experts)."""
    rows = st.integers(1, 6).map(lambda n: 2 * n)
    return st.one_of(st.tuples(rows, st.integers(1, 9)), st.tuples(st.integers(1, 4), rows, st.integers(1, 9)))


def transforms(width: int = 1) -> st.SearchStrategy[Transform]:
    """Layouts over the last two dims of tensors with an even number of rows and ``width``-byte elements, and chains of them."""
    even = st.integers(1, 8).map(lambda n: 2 * n)
    same_width = {1: [torch.int8, torch.uint8], 2: [torch.int16, torch.float16], 4: [torch.int32, torch.float32]}[width]
    single: st.SearchStrategy[Transform] = st.one_of(
        st.builds(Identity),
        st.builds(PadLast2, rows=even, cols=st.integers(1, 8)),
        st.builds(SwapHalves),
        st.builds(InterleaveHalves),
        st.builds(RollRows, by=st.integers(1, 5)),
        st.sampled_from([ViewDtype(dtype) for dtype in same_width]),
    )
    return st.lists(single, min_size=1, max_size=3).map(_chain)


def _chain(steps: list[Transform]) -> Transform:
    chain = steps[0]
    for step in steps[1:]:
        chain = chain.then(step)
    return chain


@dataclass(frozen=True)
class LayerPlan:
    """A small declared layer, described so that it can be made many times."""

    shape: tuple[int, ...]
    transform: Transform
    partitions: int
    dtype: torch.dtype = torch.uint8

    def make(self, device: str | torch.device = "cpu", *, loaded: bool = False, aliasing: bool = True) -> nn.Module:
        """The module: ``weight`` -> ``weight_prepared`` by the transform; ``scale`` -> ``alpha`` -> ``alpha_inv``."""
        layer = _Layer()
        layer.weight = nn.Parameter(torch.empty(self.shape, dtype=self.dtype, device=device), requires_grad=False)
        layer.scale = nn.Parameter(torch.empty(self.partitions, device=device), requires_grad=False)
        declare(
            layer,
            Alias("weight", "weight_prepared", self.transform),
            Derivation("alpha_inv", ("alpha",), _inverse, (1,), torch.float32),
            Derivation("alpha", ("scale",), _largest, (1,), torch.float32),
            loaded=loaded,
            aliasing=aliasing,
        )
        return layer

    def make_empty(self, device: str, aliasing: bool) -> nn.Module:
        """As :meth:`make`, in the form the state machine asks for."""
        return self.make(device, aliasing=aliasing)


class _Layer(nn.Module):
    def forward(self) -> tuple[Tensor, Tensor]:
        """The kernel names, as a kernel would read them."""
        return self.get_buffer("weight_prepared").clone(), self.get_buffer("alpha").clone()


def _largest(scale: Tensor) -> Tensor:
    return scale.max().reshape(1)


def _inverse(alpha: Tensor) -> Tensor:
    return 1.0 / alpha


def layers() -> st.SearchStrategy[LayerPlan]:
    """Layers with one aliased weight, 2-D or a 3-D stack of experts, and a chain of two derivations."""
    return dtypes().flatmap(
        lambda dtype: st.builds(
            LayerPlan,
            shape=shapes(),
            transform=transforms(dtype.itemsize),
            partitions=st.integers(1, 3),
            dtype=st.just(dtype),
        )
    )
