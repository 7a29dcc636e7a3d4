"""Loading experts with the engines' calling convention: ``weight_loader(param, loaded, weight_name, shard_id, expert_id)``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from ..checkpoint.shards import Pair, Share, fill
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
        columns: whether matrices are ``[K, N]`` with gate and up as neighbours, so that w13 is one shard.
    """

    experts: int
    first_expert: int
    all_experts: int
    tp_rank: int = 0
    tp_size: int = 1
    gated: bool = True
    interleaved: bool = False
    columns: bool = False

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
            return _write([(param, loaded_weight)], weight_name or "the whole tensor")
        shards = ("w13", "w2") if self.columns else ("w1", "w3", "w13", "w2") if self.gated else ("w1", "w13", "w2")
        if shard_id is None or shard_id not in shards or not 0 <= (expert_id or 0) < self.all_experts:
            raise ShapeError(
                "no such shard",
                name=weight_name,
                expected=f"{', '.join(shards)} of expert 0 to {self.all_experts - 1}",
                found=f"{shard_id} of expert {expert_id}",
                remedy=_NO_GATE if shards == ("w1", "w13", "w2") else None,
            )
        share = Share(self.tp_rank, self.tp_size)
        if getattr(param, "is_bias", False):  # a matrix of one column; that of w2 is whole on every rank
            dim = -2 if self.columns else -1
            param, loaded_weight = param.unsqueeze(dim), loaded_weight.unsqueeze(dim)
            share = Share() if shard_id == "w2" else share
        of_all = cast(bool, getattr(param, "of_all_experts", False))
        of_all_in_one = self.columns and param.shape == (1,) and loaded_weight.numel() == 1
        if of_all_in_one and expert_id is None:
            return _write([(param, _scales(loaded_weight, param, 0))], f"{weight_name}: {shard_id} of all experts")
        if of_all_in_one and self.experts > 1:
            raise ShapeError("one scale counts for all experts", name=weight_name, expected="no expert_id", found=expert_id)
        if expert_id is None:
            own = loaded_weight if of_all else self._own_experts(loaded_weight, weight_name)
            what = f"{weight_name}: {shard_id} of all experts"
            return _write(self._pairs(param, own, shard_id, what, share, lead=1), what)
        row = expert_id if of_all else expert_id - self.first_expert
        if not 0 <= row < param.shape[0]:
            return False
        what = f"{weight_name}: {shard_id} of expert {expert_id}"
        return _write(self._pairs(param[row], loaded_weight, shard_id, what, share, lead=0), what)

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

    def _pairs(self, target: Tensor, loaded: Tensor, shard: str, what: str, share: Share, *, lead: int) -> list[Pair]:
        """``target`` is this rank's part of ``lead`` stacked dims, then a matrix, two scales, or one."""
        if self.columns and target.dim() == lead:
            return [(target, _scales(loaded, target, lead))]
        if self.columns:
            return [(target, _part(share, loaded, -1 if shard == "w13" else -2, what))]
        half_of = {"w1": 0, "w3": 1}.get(shard) if self.gated else None
        if target.dim() - lead < 2:
            target = target if half_of is None else target[..., half_of]
            return [(target, _scales(loaded, target, lead))]
        if shard == "w2" or not self.gated:
            return [(target, _part(share, loaded, -1 if shard == "w2" else -2, what))]
        halves = target.chunk(2, -2)
        if half_of is not None:
            return [(halves[half_of], _part(share, loaded, -2, what))]
        if loaded.dim() < 2 or loaded.shape[-2] % 2:
            raise ShapeError("a fused w13 has gate and up rows", name=what, expected="[..., 2I, C]", found=list(loaded.shape))
        gate_up = (loaded[..., 0::2, :], loaded[..., 1::2, :]) if self.interleaved else loaded.chunk(2, -2)
        return [(half, _part(share, part, -2, what)) for half, part in zip(halves, gate_up, strict=True)]


_NO_GATE = "These experts have no gate: their only projection before w2 is w1."


def _part(share: Share, loaded: Tensor, dim: int, what: str) -> Tensor:
    return loaded if loaded.dim() < 2 else share.of(loaded, dim, what)


def _write(pairs: list[Pair], what: str) -> bool:
    fill(pairs, what)
    return True


def _scales(loaded: Tensor, target: Tensor, lead: int) -> Tensor:
    """One scale for each expert, 0-d or ``[1]``, in the shape of ``target``; that of a fused w13 counts for both halves."""
    own = loaded.shape[:lead]
    if own != target.shape[:lead] or math.prod(loaded.shape[lead:]) != 1:
        return loaded
    return loaded.reshape((*own, *[1] * (target.dim() - lead))).expand(target.shape)
