"""Weight loaders with the engines' calling convention: ``weight_loader(param, loaded_weight, shard_id)``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..checkpoint.shards import Pair, Share, fill
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
        if loaded_shard_id is None and dim == 0 and not factor:
            _fill(param, self._partitions(param, loaded_weight))
            return
        index = 0 if loaded_shard_id is None or factor else _index(loaded_shard_id, len(_sizes(param)))
        load_partition(param, self._share(index).of(loaded_weight, dim), loaded_shard_id)

    def _partitions(self, param: Tensor, loaded_weight: Tensor) -> list[Pair]:
        """This rank's rows of every partition of a tensor that holds all of them in the file too."""
        sizes = _sizes(param)
        shares = [self._share(index) for index in range(len(sizes))]
        whole = [size * share.count for size, share in zip(sizes, shares, strict=True)]
        if len(sizes) > 1 and loaded_weight.shape[0] != sum(whole):
            raise ShapeError(
                "this tensor does not hold the partitions",
                expected=f"{sum(whole)} rows, partitions of {whole}",
                found=list(loaded_weight.shape),
            )
        parts = torch.split(loaded_weight, whole) if len(sizes) > 1 else (loaded_weight,)
        own = [share.of(part, 0) for share, part in zip(shares, parts, strict=True)]
        return list(zip(torch.split(param, list(sizes)), own, strict=True))

    def _share(self, index: int) -> Share:
        """Of a partition: ranks in a row hold the same part where it is replicated."""
        replicas = self.replicas[index] if index < len(self.replicas) else 1
        return Share(self.rank // replicas, self.size // replicas)


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


def _fill(param: Tensor, pairs: Sequence[Pair]) -> None:
    # Factors are not quantized: a model served in another dtype casts them as it casts its norms.
    fill(pairs, cast=_is_input_factor(param))


def _copy(param: Tensor, target: Tensor, loaded: Tensor) -> None:
    scalars = getattr(param, "needs_scalar_to_array", False)
    _fill(param, [(target, loaded.reshape(1).expand(target.shape) if scalars and loaded.numel() == 1 else loaded)])
