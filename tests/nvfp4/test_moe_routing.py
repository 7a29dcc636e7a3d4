"""Routing equals transformers' own routers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aliasparam_nvfp4.errors import ShapeError
from aliasparam_nvfp4.moe.routing import (
    ROUTINGS,
    Routing,
    routing,
    sigmoid_bias_grouped,
    sigmoid_topk,
    softmax_topk,
    softmax_topk_renormalized,
)

transformers = pytest.importorskip("transformers")


def router(model: str, cls: str, config: Any) -> Any:
    module = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    made = getattr(module, cls)(config)
    torch.nn.init.normal_(made.weight, generator=torch.Generator().manual_seed(0))
    return made


def same(found: Any, expected: Any) -> None:
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


X = torch.randn(9, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("renormalize", [True, False])
def test_softmax_is_qwen3s(renormalize: bool) -> None:
    config = transformers.Qwen3MoeConfig(hidden_size=32, num_experts=16, num_experts_per_tok=4, norm_topk_prob=renormalize)
    logits, weights, ids = router("qwen3_moe", "Qwen3MoeTopKRouter", config)(X)
    found = (softmax_topk_renormalized if renormalize else softmax_topk)(logits, 4)
    assert torch.equal(found[1], ids.int()) and torch.equal(found[0], weights)
    same(Routing("softmax_topk_renormalized" if renormalize else "softmax_topk", 4).choose(logits), found)


def test_softmax_is_qwen2s() -> None:
    config = transformers.Qwen2MoeConfig(hidden_size=32, num_experts=16, num_experts_per_tok=4, norm_topk_prob=False)
    logits, weights, ids = router("qwen2_moe", "Qwen2MoeTopKRouter", config)(X)
    found = Routing("softmax_topk", 4).choose(logits)
    assert torch.equal(found[1], ids.int()) and torch.equal(found[0], weights)


def test_softmax_renormalized_is_mixtrals() -> None:
    config = transformers.MixtralConfig(hidden_size=32, num_local_experts=8, num_experts_per_tok=2)
    logits, weights, ids = router("mixtral", "MixtralTopKRouter", config)(X)
    found = softmax_topk_renormalized(logits, 2)
    assert torch.equal(found[1], ids.int()) and torch.equal(found[0], weights)
    same(Routing("softmax_topk_renormalized", 2).choose(logits), found)


def test_sigmoid_is_llama4s() -> None:
    config = transformers.Llama4TextConfig(hidden_size=32, num_local_experts=8, num_experts_per_tok=1)
    scores, logits = router("llama4", "Llama4Router", config)(X)
    weights, ids = sigmoid_topk(logits, 1)
    assert torch.equal(torch.zeros_like(scores).scatter_(1, ids.long(), weights), scores)
    same(Routing("sigmoid_topk", 1, on_input=True).choose(logits), (weights, ids))


@pytest.mark.parametrize("groups, top_groups", [(1, 1), (4, 2)])
def test_grouped_sigmoid_with_bias_is_deepseek_v3s(groups: int, top_groups: int) -> None:
    config = transformers.DeepseekV3Config(
        hidden_size=32, n_routed_experts=16, num_experts_per_tok=4, n_group=groups, topk_group=top_groups, norm_topk_prob=True
    )
    theirs = router("deepseek_v3", "DeepseekV3TopkRouter", config)
    theirs.e_score_correction_bias.copy_(torch.randn(16, generator=torch.Generator().manual_seed(2)))
    logits, weights, ids = theirs(X)
    found, chosen = sigmoid_bias_grouped(
        logits, 4, bias=theirs.e_score_correction_bias, groups=groups, top_groups=top_groups, scaling=config.routed_scaling_factor
    )
    dense = torch.zeros(9, 16)
    torch.testing.assert_close(dense.scatter(1, chosen.long(), found), dense.scatter(1, ids.long(), weights.float()))
    value = Routing(
        "sigmoid_bias_grouped",
        4,
        bias=theirs.e_score_correction_bias,
        groups=groups,
        top_groups=top_groups,
        scaling=config.routed_scaling_factor,
    )
    same(value.choose(logits), (found, chosen))


def test_unfit_choices_are_refused() -> None:
    logits = torch.zeros(2, 8)
    for bad in (
        lambda: softmax_topk(logits, 9),
        lambda: sigmoid_topk(logits, 0),
        lambda: softmax_topk(logits[0], 1),
        lambda: sigmoid_bias_grouped(logits, 2, bias=torch.zeros(8), groups=3),
        lambda: sigmoid_bias_grouped(logits, 3, bias=torch.zeros(8), groups=4, top_groups=1),
        lambda: routing("nonsense"),
        lambda: Routing("nonsense", 2),
        lambda: Routing("softmax_topk", 2, bias=torch.zeros(8)),
        lambda: Routing("softmax_topk", 2, scaling=2.0),
        lambda: Routing("sigmoid_topk", 1, renormalize=False),
        lambda: Routing("sigmoid_bias_grouped", 2),
        lambda: Routing("sigmoid_topk", 2, on_input=True),
    ):
        with pytest.raises(ShapeError):
            bad()


def test_a_routing_is_a_value_of_any_kind() -> None:
    for kind in ROUTINGS:
        bias = torch.zeros(8) if kind == "sigmoid_bias_grouped" else None
        weights, ids = Routing(kind, 3, bias=bias).choose(torch.randn(5, 8))
        assert weights.dtype is torch.float32 and ids.dtype is torch.int32 and weights.shape == ids.shape == (5, 3)
