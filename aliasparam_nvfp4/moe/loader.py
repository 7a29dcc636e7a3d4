"""Loading experts with the engines' calling convention: ``weight_loader(param, loaded, weight_name, shard_id, expert_id)``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..errors import ShapeError


@dataclass(frozen=True)
class ExpertLoader:
    """Writes projections of experts, as the checkpoint has them, to this rank's part of a layer.

    It keeps nothing between calls: a shard that comes again replaces the first, as in the engines, and whether all came is seen
    by ``process_weights_after_loading``, byte for byte. :func:`aliasparam.reload` refuses rows that come twice.

    Attributes:
        experts: experts of this rank.
        first_expert: global number of the first of them.
        all_experts: experts of all ranks.
        tp_rank: this rank among those which divide I.
        tp_size: how many divide I. Rows of w1 and w3 and columns of w2 are divided, scales alike.
        gated: whether there is a w3.
        interleaved: whether rows of a fused w13 come as ``[g0, u0, g1, u1, ...]`` and not as ``[gate; up]``.
    """

    experts: int
    first_expert: int
    all_experts: int
    tp_rank: int = 0
    tp_size: int = 1
    gated: bool = True
    interleaved: bool = False

    def __call__(
        self,
        param: Tensor,
        loaded_weight: Tensor,
        weight_name: str = "",
        shard_id: str | None = None,
        expert_id: int | None = None,
        return_success: bool = False,
    ) -> bool:
        """Returns False for an expert of another rank, of which nothing is kept (input scales are kept of all).

        Args:
            param: the layer's name: ``w13_weight``, ``w2_weight_scale``, ...
            loaded_weight: the tensor from the checkpoint, of the whole I. Scales of a projection may be 0-d or ``[1]``.
            weight_name: its name there, for messages.
            shard_id: "w1" (gate, or the only one), "w3" (up), "w13" (both, ``[2I, ...]``; one scale counts for both) or "w2"
                (down); None, with no expert, for the whole of ``param`` as it is: rows ``[gate; up]``, this rank's part.
            expert_id: global number; None, with a shard, for all experts of all ranks stacked, ``[E, ...]``.
            return_success: of vLLM's calling convention; the result is the same.

        Raises:
            ShapeError: no such shard or expert, another number of experts, or a tensor which does not fit. Nothing is written
                then.
        """
        if shard_id is None and expert_id is None:
            return _copy(param, loaded_weight, weight_name or "the whole tensor")
        shards = ("w1", "w3", "w13", "w2") if self.gated else ("w1", "w13", "w2")
        if shard_id is None or shard_id not in shards or not 0 <= (expert_id or 0) < self.all_experts:
            raise ShapeError(
                "no such shard",
                name=weight_name,
                expected=f"{', '.join(shards)} of expert 0 to {self.all_experts - 1}",
                found=f"{shard_id} of expert {expert_id}",
                remedy=None if self.gated else "These experts have no gate: their only projection before w2 is w1.",
            )
        if getattr(param, "is_bias", False):  # a matrix of one column
            param, loaded_weight = param.unsqueeze(-1), loaded_weight.unsqueeze(-1)
        of_all = cast(bool, getattr(param, "of_all_experts", False))
        if expert_id is None:
            own = loaded_weight if of_all else self._own_experts(loaded_weight, weight_name)
            return self._write(param, own, shard_id, f"{weight_name}: {shard_id} of all experts", lead=1)
        row = expert_id if of_all else expert_id - self.first_expert
        if not 0 <= row < param.shape[0]:
            return False
        return self._write(param[row], loaded_weight, shard_id, f"{weight_name}: {shard_id} of expert {expert_id}", lead=0)

    def _own_experts(self, loaded: Tensor, name: str) -> Tensor:
        if loaded.dim() == 0 or loaded.shape[0] != self.all_experts:
            raise ShapeError(
                "another number of experts",
                name=name,
                expected=f"{self.all_experts} experts stacked",
                found=list(loaded.shape),
                remedy="Send every expert of all ranks, or one at a time with its expert_id.",
            )
        return loaded.narrow(0, self.first_expert, self.experts)

    def _write(self, target: Tensor, loaded: Tensor, shard: str, what: str, *, lead: int) -> bool:
        """``target`` is this rank's part of ``lead`` stacked dims, then a matrix, two scales, or one."""
        half_of = {"w1": 0, "w3": 1}.get(shard) if self.gated else None
        if target.dim() - lead < 2:
            target = target if half_of is None else target[..., half_of]
            return _copy(target, _scales(loaded, target, lead), what)
        if shard == "w2":
            return _copy(target, self._own_part(loaded, -1, what), what)
        if not self.gated:
            return _copy(target, self._own_part(loaded, -2, what), what)
        rows = target.shape[-2] // 2
        halves = target[..., :rows, :], target[..., rows:, :]
        if half_of is not None:
            return _copy(halves[half_of], self._own_part(loaded, -2, what), what)
        parts = self._gate_up(loaded, what)
        for half, part in zip(halves, parts, strict=True):
            _need_fit(half, part, what)
        return all(_copy(half, part, what) for half, part in zip(halves, parts, strict=True))

    def _gate_up(self, loaded: Tensor, what: str) -> tuple[Tensor, Tensor]:
        """Views of this rank's gate and up rows of a fused w13."""
        if loaded.dim() < 2 or loaded.shape[-2] % 2:
            raise ShapeError("a fused w13 has gate and up rows", name=what, expected="[..., 2I, C]", found=list(loaded.shape))
        if self.interleaved:
            return self._own_part(loaded[..., 0::2, :], -2, what), self._own_part(loaded[..., 1::2, :], -2, what)
        gate, up = loaded.chunk(2, -2)
        return self._own_part(gate, -2, what), self._own_part(up, -2, what)

    def _own_part(self, loaded: Tensor, dim: int, what: str) -> Tensor:
        if loaded.dim() < 2 or self.tp_size == 1:
            return loaded
        if loaded.shape[dim] % self.tp_size:
            raise ShapeError(
                "this tensor cannot be divided among the ranks",
                name=what,
                expected=f"dim {loaded.dim() + dim} a multiple of {self.tp_size}",
                found=list(loaded.shape),
                remedy="Use a tensor-parallel size which divides it (blocks of 16 stay whole).",
            )
        width = loaded.shape[dim] // self.tp_size
        return loaded.narrow(dim, self.tp_rank * width, width)


def _scales(loaded: Tensor, target: Tensor, lead: int) -> Tensor:
    """One scale for each expert, 0-d or ``[1]``, in the shape of ``target``; that of a fused w13 counts for both halves."""
    own = loaded.shape[:lead]
    if own != target.shape[:lead] or math.prod(loaded.shape[lead:]) != 1:
        return loaded
    return loaded.reshape((*own, *[1] * (target.dim() - lead))).expand(target.shape)


def _need_fit(target: Tensor, value: Tensor, what: str) -> None:
    if value.shape != target.shape or value.dtype != target.dtype:
        raise ShapeError(
            "the loaded shard does not fit",
            name=what,
            expected=f"{target.dtype} {list(target.shape)}",
            found=f"{value.dtype} {list(value.shape)}",
        )


def _copy(target: Tensor, value: Tensor, what: str) -> bool:
    _need_fit(target, value, what)
    with torch.no_grad():
        target.copy_(value)
    return True
