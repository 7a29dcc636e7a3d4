"""Weight loaders with the engines' calling convention: ``weight_loader(param, loaded_weight, shard_id)``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import ShapeError

_SHARD_INDEX = {"q": 0, "k": 1, "v": 2}


def load_partition(param: Tensor, loaded_weight: Tensor, loaded_shard_id: str | int | None = None) -> None:
    """One partition of a fused tensor, or the whole, for a layer that is not sharded.

    Args:
        param: one of the layer's checkpoint names.
        loaded_weight: a shard as the checkpoint stores it; a scalar for the per-partition scales.
        loaded_shard_id: "q", "k", "v", a partition index, or None for everything.

    Raises:
        ShapeError: unknown shard, or a shard of another shape or dtype. Nothing is written then.
    """
    _copy(_partition(param, loaded_shard_id), loaded_weight)


@dataclass(frozen=True)
class ShardedLoader:
    """Takes this rank's part out of whole checkpoint tensors, then loads it as :func:`load_partition`.

    Args:
        rank: of the tensor-parallel group.
        size: of the tensor-parallel group.
        style: "column": rows (output features) of each partition are divided; "row": columns (input features) are.
    """

    rank: int
    size: int
    style: Literal["column", "row"]

    def __call__(self, param: Tensor, loaded_weight: Tensor, loaded_shard_id: str | int | None = None) -> None:
        """Raises ShapeError where the tensor cannot be divided among the ranks, or does not fit. Nothing is written then."""
        if loaded_weight.dim() < 2:  # per-tensor scales are the same on every rank
            load_partition(param, loaded_weight, loaded_shard_id)
            return
        dim = 0 if self.style == "column" else 1
        if loaded_weight.shape[dim] % self.size:
            raise ShapeError(
                "this tensor cannot be divided among the ranks",
                expected=f"dim {dim} a multiple of {self.size}",
                found=list(loaded_weight.shape),
                remedy="Use a tensor-parallel size which divides it (blocks of 16 stay whole).",
            )
        if loaded_shard_id is None and dim == 0 and len(sizes := _sizes(param)) > 1:
            for index, part in enumerate(torch.split(loaded_weight, [s * self.size for s in sizes])):  # fused in the file
                self(param, part, index)
            return
        width = loaded_weight.shape[dim] // self.size
        load_partition(param, loaded_weight.narrow(dim, self.rank * width, width), loaded_shard_id)


def _sizes(param: Tensor) -> Sequence[int]:
    sizes: Sequence[int] = getattr(param, "output_partition_sizes", (1,) * (param.shape[0] if param.dim() else 1))
    return sizes


def _partition(param: Tensor, shard_id: str | int | None) -> Tensor:
    if shard_id is None:
        return param
    index = _SHARD_INDEX.get(shard_id, -1) if isinstance(shard_id, str) else shard_id
    sizes = _sizes(param)
    if not 0 <= index < len(sizes):
        raise ShapeError("no such shard", expected=f"one of {len(sizes)} partitions", found=repr(shard_id))
    return param[sum(sizes[:index]) : sum(sizes[: index + 1])]


def _copy(target: Tensor, loaded: Tensor) -> None:
    value = loaded.reshape(1).expand(target.shape) if loaded.numel() == 1 and target.dim() == 1 else loaded
    if value.shape != target.shape or value.dtype != target.dtype:
        raise ShapeError(
            "the loaded shard does not fit",
            expected=f"{target.dtype} {list(target.shape)}",
            found=f"{loaded.dtype} {list(loaded.shape)}",
        )
    with torch.no_grad():
        target.copy_(value)
