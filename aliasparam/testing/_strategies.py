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


def transforms() -> st.SearchStrategy[Transform]:
    """Layouts over the last two dims of one-byte tensors with an even number of rows, and chains of them."""
    even = st.integers(1, 8).map(lambda n: 2 * n)
    single: st.SearchStrategy[Transform] = st.one_of(
        st.builds(Identity),
        st.builds(PadLast2, rows=even, cols=st.integers(1, 8)),
        st.builds(SwapHalves),
        st.builds(InterleaveHalves),
        st.builds(RollRows, by=st.integers(1, 5)),
        st.sampled_from([ViewDtype(torch.int8), ViewDtype(torch.uint8)]),
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

    def make(self, device: str | torch.device = "cpu", *, loaded: bool = False, aliasing: bool = True) -> nn.Module:
        """The module: ``weight`` -> ``weight_prepared`` by the transform; ``scale`` -> ``alpha`` -> ``alpha_inv``."""
        layer = _Layer()
        layer.weight = nn.Parameter(torch.empty(self.shape, dtype=torch.uint8, device=device), requires_grad=False)
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
    rows = st.integers(1, 6).map(lambda n: 2 * n)
    matrix = st.tuples(rows, st.integers(1, 9))
    stack = st.tuples(st.integers(1, 4), rows, st.integers(1, 9))
    return st.builds(LayerPlan, shape=st.one_of(matrix, stack), transform=transforms(), partitions=st.integers(1, 3))
