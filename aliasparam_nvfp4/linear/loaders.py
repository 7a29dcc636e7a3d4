"""Weight loaders with the engines' calling convention: ``weight_loader(param, loaded_weight, shard_id)``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import ShapeError

_SHARD_INDEX = {"q": 0, "k": 1, "v": 2}


def load_partition(param: Tensor, loaded_weight: Tensor, loaded_shard_id: str | int | None = None) -> None:
    """One partition of a fused tensor, or the whole, for a layer that is not sharded.

    Args:
        param: one of the layer's checkpoint names.
        loaded_weight: a shard as the checkpoint stores it; a scalar for the per-partition scales. Factors of the input features
            (AWQ's ``pre_quant_scale``) are one for all partitions: the shards after the first must equal it.
        loaded_shard_id: "q", "k", "v", a partition index, or None for everything.

    Raises:
        ShapeError: unknown shard, a shard of another shape or dtype, or input factors that differ. Nothing is written then.
    """
    if loaded_shard_id is None:
        _copy(param, param, loaded_weight)
    elif _is_input_factor(param):
        _copy_factor(param, loaded_weight, _index(loaded_shard_id, param.partitions))  # type: ignore[attr-defined]
    else:
        sizes = _sizes(param)
        index = _index(loaded_shard_id, len(sizes))
        _copy(param, param[sum(sizes[:index]) : sum(sizes[: index + 1])], loaded_weight)


@dataclass(frozen=True)
class ShardedLoader:
    """Takes this rank's part out of whole checkpoint tensors, then loads it as :func:`load_partition`.

    Args:
        rank: of the tensor-parallel group.
        size: of the tensor-parallel group.
        style: "column": rows (output features) of each partition are divided; "row": columns (input features) are.
        replicas: how many ranks in a row hold the same part of each partition, 1 where left out. With fewer KV heads than ranks
            it is (1, size / heads, size / heads) for q, k and v, as engines do it.

    Raises:
        ShapeError: no such rank or style, or replicas that do not divide the ranks.
    """

    rank: int
    size: int
    style: Literal["column", "row"]
    replicas: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.style not in ("column", "row"):
            raise ShapeError("unknown style of sharding", expected="'column' or 'row'", found=repr(self.style))
        if not 0 <= self.rank < self.size:
            raise ShapeError("no such rank", expected=f"0 to {self.size - 1} of {self.size}", found=self.rank)
        if any(r < 1 or self.size % r for r in self.replicas) or (self.replicas and self.style == "row"):
            raise ShapeError(
                "partitions cannot be replicated like this",
                expected=f'style "column" and numbers which divide {self.size}',
                found=f"style {self.style!r}, replicas {self.replicas}",
            )

    def __call__(self, param: Tensor, loaded_weight: Tensor, loaded_shard_id: str | int | None = None) -> None:
        """Raises ShapeError where the tensor cannot be divided among the ranks, or does not fit. Nothing is written then."""
        factor = _is_input_factor(param) and loaded_weight.dim() == 1
        if (loaded_weight.dim() < 2 and not factor) or (factor and self.style == "column"):
            load_partition(param, loaded_weight, loaded_shard_id)  # the same on every rank
            return
        dim = 0 if factor or self.style == "column" else 1
        if loaded_shard_id is None and dim == 0 and len(sizes := _sizes(param)) > 1 and not factor:
            self._fused(param, loaded_weight, sizes)
            return
        index = 0 if loaded_shard_id is None or factor else _index(loaded_shard_id, len(_sizes(param)))
        load_partition(param, self._own(loaded_weight, dim, index), loaded_shard_id)

    def _fused(self, param: Tensor, loaded_weight: Tensor, sizes: Sequence[int]) -> None:
        """A tensor that holds all partitions in the file too. All is checked before the first is written."""
        whole = [s * self.size // self._replicas(i) for i, s in enumerate(sizes)]
        if loaded_weight.shape[0] != sum(whole):
            raise ShapeError(
                "this tensor does not hold the partitions",
                expected=f"{sum(whole)} rows, partitions of {whole}",
                found=list(loaded_weight.shape),
            )
        own = [self._own(part, 0, index) for index, part in enumerate(torch.split(loaded_weight, whole))]
        load_partition(param, torch.cat([p.view(torch.uint8) for p in own]).view(loaded_weight.dtype))

    def _replicas(self, index: int) -> int:
        return self.replicas[index] if index < len(self.replicas) else 1

    def _own(self, whole: Tensor, dim: int, index: int) -> Tensor:
        """This rank's part of one partition."""
        parts = self.size // self._replicas(index)
        if whole.shape[dim] % parts:
            raise ShapeError(
                "this tensor cannot be divided among the ranks",
                expected=f"dim {dim} a multiple of {parts}",
                found=list(whole.shape),
                remedy="Use a tensor-parallel size which divides it (blocks of 16 stay whole).",
            )
        width = whole.shape[dim] // parts
        return whole.narrow(dim, self.rank // self._replicas(index) * width, width)


def _is_input_factor(param: Tensor) -> bool:
    """Whether it has one value for each input feature, and none of its own for each partition."""
    return getattr(param, "input_dim", None) == 0


def _sizes(param: Tensor) -> Sequence[int]:
    sizes: Sequence[int] = getattr(param, "output_partition_sizes", (1,) * (param.shape[0] if param.dim() else 1))
    return sizes


def _index(shard_id: str | int, partitions: int) -> int:
    index = _SHARD_INDEX.get(shard_id, -1) if isinstance(shard_id, str) else shard_id
    if not 0 <= index < partitions:
        raise ShapeError("no such shard", expected=f"one of {partitions} partitions", found=repr(shard_id))
    return index


def _copy_factor(param: Tensor, loaded: Tensor, index: int) -> None:
    """The first shard of a load is written; the others must say the same."""
    seen: set[int] = param.shards_seen  # type: ignore[attr-defined]
    if index in seen:  # the next load has begun
        seen.clear()
    if not seen:
        _copy(param, param, loaded)
    elif loaded.shape != param.shape or not torch.equal(loaded.to(param.device, param.dtype), param.detach()):
        raise ShapeError(
            "the input factors of fused projections differ, and they share one input",
            name="pre_quant_scale",
            expected="the factors of the shard that was loaded first",
            found=f"others in shard {index}",
            remedy="Export the checkpoint with unified factors, or load these projections unfused.",
        )
    seen.add(index)


def _copy(param: Tensor, target: Tensor, loaded: Tensor) -> None:
    scalars = getattr(param, "needs_scalar_to_array", False)
    value = loaded.reshape(1).expand(target.shape) if scalars and loaded.numel() == 1 else loaded
    # Factors are not quantized: a model served in another dtype casts them as it casts its norms.
    cast = _is_input_factor(param) and value.is_floating_point() and value.element_size() > 1
    if value.shape != target.shape or (value.dtype != target.dtype and not cast):
        raise ShapeError(
            "the loaded shard does not fit",
            expected=f"{target.dtype} {list(target.shape)}",
            found=f"{loaded.dtype} {list(loaded.shape)}",
        )
    with torch.no_grad():
        target.copy_(value)
