"""Row permutations: the kernel's row order as one index formula."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ._constants import kept
from ._transform import Band, TensorSpec, Transform, need_dims
from .errors import TransformError


class PermuteRows(Transform):
    """Rows (dim -2) in another order: kernel row i is checkpoint row ``source_rows(R)[i]``. Any dtype, any number of columns.

    A subclass gives the formula; it must be hashable (a frozen dataclass), because index tensors are kept per row count.
    """

    core_dims: int = 2

    @abstractmethod
    def source_rows(self, rows: int) -> Tensor:
        """The checkpoint row of each kernel row, int64 ``[rows]`` on the CPU. Raises TransformError for unfit row counts."""

    @property
    def block_rows(self) -> int | None:
        """Rows of the aligned blocks that the permutation maps to themselves, or None where rows move across the whole."""
        return None

    def output_spec(self, spec: TensorSpec) -> TensorSpec:
        need_dims(self, spec, 2)
        _indices(self, spec.shape[-2], torch.device("cpu"))
        return spec

    def forward(self, tensor: Tensor) -> Tensor:
        return _gather(tensor, _indices(self, tensor.shape[-2], tensor.device)[0])

    def inverse(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
        return _gather(tensor, _indices(self, tensor.shape[-2], tensor.device)[1])

    def band(self, spec: TensorSpec) -> Band | None:
        return Band(-1, 1) if self.block_rows is None else Band(-2, self.block_rows)


def _gather(tensor: Tensor, rows: Tensor) -> Tensor:
    if tensor.dtype.itemsize > 1:
        return tensor.index_select(-2, rows)
    return tensor.view(torch.uint8).index_select(-2, rows).view(tensor.dtype)  # 8-bit floats have few operators


@kept
def _indices(transform: PermuteRows, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(gather indices, their inverse) on ``device``."""
    gather = transform.source_rows(rows)
    inverse = torch.empty_like(gather)
    inverse[gather] = torch.arange(rows)
    return gather.to(device), inverse.to(device)


@dataclass(frozen=True)
class SwapHalves(PermuteRows):
    """Exchange the two halves of the rows: ``[gate; up] <-> [up; gate]``. An involution."""

    def source_rows(self, rows: int) -> Tensor:
        if rows % 2:
            raise TransformError("cannot swap the halves of an odd number of rows", expected="an even row count", found=rows)
        return torch.arange(rows).roll(rows // 2)


@dataclass(frozen=True)
class InterleaveHalves(PermuteRows):
    """Blocks of ``block`` rows taken in turn from the two halves: ``[a; b]`` to ``a0 b0 a1 b1 …``.

    Block 1 is the pairwise interleave of gate and up rows.
    """

    block: int = 1

    def source_rows(self, rows: int) -> Tensor:
        if rows % (2 * self.block):
            raise TransformError(
                f"cannot interleave halves in blocks of {self.block} rows",
                expected=f"rows a multiple of {2 * self.block}",
                found=rows,
            )
        return torch.arange(rows).view(2, -1, self.block).transpose(0, 1).reshape(-1)


@dataclass(frozen=True)
class DeinterleaveHalves(PermuteRows):
    """The other way: ``a0 b0 a1 b1 …`` to ``[a; b]``."""

    block: int = 1

    def source_rows(self, rows: int) -> Tensor:
        interleaved = InterleaveHalves(self.block).source_rows(rows)
        inverse = torch.empty_like(interleaved)
        inverse[interleaved] = torch.arange(rows)
        return inverse
