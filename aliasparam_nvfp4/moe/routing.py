"""How common models choose experts: ``(topk_weights f32 [T, k], topk_ids int32 [T, k])`` from router logits ``[T, E]``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import ShapeError

Choice = tuple[Tensor, Tensor]


def softmax_topk(logits: Tensor, top_k: int) -> Choice:
    """The ``top_k`` largest probabilities as they are (Qwen2-MoE; Qwen3-MoE with ``norm_topk_prob=False``)."""
    weights, ids = torch.softmax(logits.float(), -1).topk(_checked(logits, top_k), dim=-1)
    return weights, ids.int()


def softmax_topk_renormalized(logits: Tensor, top_k: int) -> Choice:
    """The same, divided by their sum (Mixtral, Qwen3-MoE)."""
    weights, ids = softmax_topk(logits, top_k)
    return weights / weights.sum(-1, keepdim=True), ids


def sigmoid_topk(logits: Tensor, top_k: int) -> Choice:
    """The sigmoid of the ``top_k`` largest logits (Llama 4).

    Llama 4 multiplies the expert's *input* with this weight: multiply x by it and give ``apply`` ones (its models have k = 1),
    or say ``Routing("sigmoid_topk", 1, on_input=True)``.
    """
    values, ids = logits.topk(_checked(logits, top_k), dim=-1)
    return torch.sigmoid(values.float()), ids.int()


def sigmoid_bias_grouped(
    logits: Tensor,
    top_k: int,
    *,
    bias: Tensor,
    groups: int = 1,
    top_groups: int = 1,
    scaling: float = 1.0,
    renormalize: bool = True,
) -> Choice:
    """DeepSeek-V3 and Kimi-K2: the bias takes part in the choice and not in the weight.

    Args:
        logits: ``[T, E]``.
        top_k: experts a token.
        bias: f32 ``[E]``, the checkpoint's ``e_score_correction_bias``.
        groups: equal groups of neighbouring experts; a group counts by the sum of its two best.
        top_groups: groups which may be chosen from.
        scaling: the weights are multiplied with this (``routed_scaling_factor``).
        renormalize: whether the weights are first divided by their sum.
    """
    experts = logits.shape[-1]
    if experts % groups or not 0 < top_groups <= groups or top_k > top_groups * (experts // groups) or bias.shape != (experts,):
        raise ShapeError(
            "these groups do not fit the experts",
            expected="experts % groups == 0, top_groups <= groups, top_k within the chosen groups, a bias for each expert",
            found=f"{experts} experts, {groups} groups, top_groups {top_groups}, top_k {top_k}, bias {list(bias.shape)}",
        )
    scores = torch.sigmoid(logits.float())
    grouped = (scores + bias).view(-1, groups, experts // groups)
    best = grouped.topk(min(2, experts // groups), dim=-1).values.sum(-1)
    chosen = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(top_groups, dim=-1).indices, True)
    ids = grouped.masked_fill(~chosen.unsqueeze(-1), float("-inf")).flatten(1).topk(_checked(logits, top_k), dim=-1).indices
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scaling, ids.int()


#: By name, for configuration files.
ROUTINGS: dict[str, Callable[..., Choice]] = {
    "softmax_topk": softmax_topk,
    "softmax_topk_renormalized": softmax_topk_renormalized,
    "sigmoid_topk": sigmoid_topk,
    "sigmoid_bias_grouped": sigmoid_bias_grouped,
}


def routing(name: str) -> Callable[..., Choice]:
    """The function of this name. Raises ShapeError for an unknown one."""
    if name not in ROUTINGS:
        raise ShapeError("unknown routing", expected=f"one of {sorted(ROUTINGS)}", found=repr(name))
    return ROUTINGS[name]


@dataclass(frozen=True)
class Routing:
    """A model's way of choosing experts, as a value: for runners whose kernel routes, and for those which do not.

    Attributes:
        kind: a name of :data:`ROUTINGS`.
        top_k: experts a token.
        bias: f32 or bf16 ``[E]``; for ``sigmoid_bias_grouped``, and needed there.
        groups: see :func:`sigmoid_bias_grouped`, as the next three.
        top_groups: groups which may be chosen from.
        scaling: factor of the weights.
        renormalize: whether the weights are first divided by their sum.
        on_input: the weight multiplies the expert's input instead of its output (Llama 4; ``top_k`` 1).

    Raises:
        ShapeError: an unknown kind, or numbers which the kind does not have.
    """

    kind: str
    top_k: int
    bias: Tensor | None = field(default=None, compare=False)
    groups: int = 1
    top_groups: int = 1
    scaling: float = 1.0
    renormalize: bool = True
    on_input: bool = False

    def __post_init__(self) -> None:
        routing(self.kind)
        grouped = self.kind == "sigmoid_bias_grouped"
        numbers = (self.groups, self.top_groups, self.scaling, self.renormalize)
        if grouped is (self.bias is None) or not (grouped or numbers == (1, 1, 1.0, True)):
            raise ShapeError(
                "these numbers are not this routing's",
                name=self.kind,
                expected="bias, groups, top_groups, scaling and renormalize for sigmoid_bias_grouped, and for no other",
                found=f"bias {'absent' if self.bias is None else 'given'}, {numbers}",
            )
        if self.on_input and self.top_k != 1:
            raise ShapeError("a weight on the input needs one expert a token", expected="top_k 1", found=self.top_k)

    def choose(self, logits: Tensor) -> Choice:
        """(f32 ``[T, k]``, int32 ``[T, k]``) from router logits ``[T, E]``. Raises ShapeError for logits that do not fit."""
        if self.bias is None:
            return routing(self.kind)(logits, self.top_k)
        return sigmoid_bias_grouped(
            logits,
            self.top_k,
            bias=self.bias,
            groups=self.groups,
            top_groups=self.top_groups,
            scaling=self.scaling,
            renormalize=self.renormalize,
        )


def _checked(logits: Tensor, top_k: int) -> int:
    if logits.dim() != 2 or not 0 < top_k <= logits.shape[-1]:
        raise ShapeError(
            "cannot choose that many experts", expected="logits [T, E], 0 < k <= E", found=f"{top_k} of {list(logits.shape)}"
        )
    return top_k
