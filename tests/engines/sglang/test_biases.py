"""Biases: of linear layers they are SGLang's parameters, added by ours; of experts they are refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("sglang", reason="SGLang is not installed: make test-sglang")

from aliasparam_nvfp4.errors import BackendError

from ..biases import biased, near
from .folders import moe
from .runner import PROMPT, Runner


@pytest.fixture(autouse=True)
def plugins() -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()


def test_biases_of_fused_projections_are_added_and_updated(tmp_path: Path) -> None:
    folders = {tag: biased(tmp_path / tag, seed) for seed, tag in enumerate("ab")}
    runner = Runner(folders["a"])
    assert near(runner.logits()[0].log_softmax(-1), folders["a"], PROMPT)
    assert runner.updater.update_weights_from_disk(str(folders["b"]), "auto")[0]
    assert near(runner.logits()[0].log_softmax(-1), folders["b"], PROMPT)


def test_biases_of_experts_are_refused_by_name(tmp_path: Path) -> None:
    """Of SGLang's layer. Its gpt-oss, the one model that has them, wants an attention that no CPU has here."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    found = Runner(moe(tmp_path / "moe", 0)).model.model.layers[0].mlp.experts
    make = partial(FusedMoE, 8, 64, 64, 0, top_k=2, quant_config=found.quant_config, params_dtype=torch.bfloat16)
    make()
    with pytest.raises(BackendError, match="biases of experts"):
        make(with_bias=True)
