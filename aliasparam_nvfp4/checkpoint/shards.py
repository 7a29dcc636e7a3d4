"""Which part of a name a checkpoint tensor fills: what the weight loaders of linear layers and of experts have in common.

A loader says it as pairs: a view of the name, and the part of the tensor that belongs there. All pairs are looked at before the
first is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aliasparam.spec import is_wide

from ..errors import ShapeError

#: (view of a name, value).
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Share:
    """Part ``number`` of ``count`` equal ones."""

    number: int = 0
    count: int = 1

    def of(self, whole: Tensor, dim: int, name: str | None = None) -> Tensor:
        """A view of this share of ``whole`` along ``dim``.

        Raises:
            ShapeError: it cannot be divided. ``name`` says in messages which tensor that was.
        """
        if self.count == 1:
            return whole
        if whole.shape[dim] % self.count:
            raise ShapeError(
                "this tensor cannot be divided among the ranks",
                name=name,
                expected=f"dim {dim % whole.dim()} a multiple of {self.count}",
                found=list(whole.shape),
                remedy="Use a tensor-parallel size which divides it (blocks of 16 stay whole).",
            )
        width = whole.shape[dim] // self.count
        return whole.narrow(dim, self.number * width, width)


def fill(pairs: Sequence[Pair], name: str | None = None, *, cast: bool = False) -> None:
    """Write every value into its view, or none.

    Args:
        pairs: what goes where.
        name: of the tensor, for messages.
        cast: whether a value of another floating dtype is converted.

    Raises:
        ShapeError: another shape or dtype. Nothing is written then.
    """
    for target, value in pairs:
        converts = cast and is_wide(value.dtype)
        if value.shape != target.shape or (value.dtype != target.dtype and not converts):
            raise ShapeError(
                "the loaded shard does not fit",
                name=name,
                expected=f"{target.dtype} {list(target.shape)}",
                found=f"{value.dtype} {list(value.shape)}",
            )
    with torch.no_grad():
        for target, value in pairs:
            target.copy_(value)
