"""Loading experts with the engines' calling convention: ``weight_loader(param, loaded, weight_name, shard_id, expert_id)``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..errors import ShapeError


@dataclass(frozen=True)
class ExpertLoader:
    """Writes one projection of one expert, as the checkpoint has it, to this rank's part of a layer.

    Attributes:
        experts: experts of this rank.
        first_expert: global number of the first of them.
        all_experts: experts of all ranks.
        tp_rank: this rank among those which divide I.
        tp_size: how many divide I. Rows of w1 and w3 and columns of w2 are divided, scales alike.
    """

    experts: int
    first_expert: int
    all_experts: int
    tp_rank: int = 0
    tp_size: int = 1

    def __call__(
        self,
        param: Tensor,
        loaded_weight: Tensor,
        weight_name: str = "",
        shard_id: str | None = None,
        expert_id: int | None = None,
    ) -> bool:
        """Returns False for an expert of another rank, of which nothing is kept (input scales are kept of all).

        Args:
            param: the layer's name: ``w13_weight``, ``w2_weight_scale``, ...
            loaded_weight: the tensor from the checkpoint.
            weight_name: its name there, for messages.
            shard_id: "w1" (gate), "w3" (up) or "w2" (down); None, with no expert, for the whole of ``param`` as it is.
            expert_id: global number.

        Raises:
            ShapeError: no such shard or expert, or a tensor which does not fit. Nothing is written then.
        """
        if shard_id is None and expert_id is None:
            return _copy(param, loaded_weight, weight_name or "the whole tensor")
        if expert_id is None or shard_id not in ("w1", "w2", "w3") or not 0 <= expert_id < self.all_experts:
            raise ShapeError(
                "no such shard",
                name=weight_name,
                expected=f"w1, w2 or w3 of expert 0 to {self.all_experts - 1}",
                found=f"{shard_id} of expert {expert_id}",
            )
        of_all = cast(bool, getattr(param, "of_all_experts", False))
        row = expert_id if of_all else expert_id - self.first_expert
        if not 0 <= row < param.shape[0]:
            return False
        target, value = param[row], self._own_part(loaded_weight, shard_id, weight_name)
        if shard_id != "w2":
            half = target.shape[0] // 2
            target = target[:half] if shard_id == "w1" else target[half:]
        value = value.reshape(target.shape) if loaded_weight.numel() == 1 else value
        return _copy(target, value, f"{weight_name}: {shard_id} of expert {expert_id}")

    def _own_part(self, loaded: Tensor, shard_id: str, name: str) -> Tensor:
        if loaded.dim() < 2 or self.tp_size == 1:
            return loaded
        dim = 1 if shard_id == "w2" else 0
        if loaded.shape[dim] % self.tp_size:
            raise ShapeError(
                "this tensor cannot be divided among the ranks",
                name=name,
                expected=f"dim {dim} a multiple of {self.tp_size}",
                found=list(loaded.shape),
                remedy="Use a tensor-parallel size which divides it (blocks of 16 stay whole).",
            )
        width = loaded.shape[dim] // self.tp_size
        return loaded.narrow(dim, self.tp_rank * width, width)


def _copy(target: Tensor, value: Tensor, what: str) -> bool:
    if value.shape != target.shape or value.dtype != target.dtype:
        raise ShapeError(
            "the loaded shard does not fit",
            name=what,
            expected=f"{target.dtype} {list(target.shape)}",
            found=f"{value.dtype} {list(value.shape)}",
        )
    with torch.no_grad():
        target.copy_(value)
    return True
