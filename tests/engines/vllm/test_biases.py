"""Biases: of linear layers they are vLLM's parameters, added by ours; of experts they are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from .engine import answer, reload, start, stop  # skips without vLLM

from ..biases import PROMPT, biased, gpt_oss, near  # isort: skip


def test_biases_of_fused_projections_are_added_and_reloaded(tmp_path: Path) -> None:
    a, b = (biased(tmp_path / tag, seed) for seed, tag in enumerate("ab"))
    llm = start(a, skip_tokenizer_init=True, max_logprobs=64)
    assert near(answer(llm), a, PROMPT)
    reload(llm, weights_path=str(b))
    assert near(answer(llm), b, PROMPT)
    stop(llm)


def test_biases_of_experts_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="biases of experts"):
        start(gpt_oss(tmp_path / "gpt-oss"), skip_tokenizer_init=True)
