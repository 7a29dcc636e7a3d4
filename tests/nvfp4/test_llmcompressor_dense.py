"""Dense folders that the real llm-compressor wrote with either scheme, if ALIASPARAM_LLMCOMPRESSOR names where they are."""

from __future__ import annotations

import pytest
import torch

from aliasparam import checkpoint_state_dict

pytest.importorskip("transformers")
from aliasparam_nvfp4.integrations.transformers import answer, load_model, logits, reload_folder

from .test_llmcompressor import PROMPT, folder
from .test_moe_real import same_as_file


@pytest.mark.real
@pytest.mark.parametrize(("name", "quantized"), [("dense", True), ("dense-a16", False)])
def test_projections_are_fused_served_and_exported_byte_for_byte(name: str, quantized: bool) -> None:
    """llm-compressor unifies the global scales of q, k and v, and of gate and up: so they fuse."""
    path = folder(name)
    model, tokenizer = load_model(path, "reference")
    first = logits(model, tokenizer, PROMPT)

    for layer in model.model.layers:
        assert layer.self_attn.qkv_proj.partitions == (576, 192, 192)
        assert layer.mlp.gate_up_proj.partitions == (1536, 1536)
        assert layer.self_attn.qkv_proj.quant_method.input_scale is quantized
    assert "The capital of France is Paris" in answer(model, tokenizer, PROMPT)
    assert same_as_file(checkpoint_state_dict(model), path)
    reload_folder(model, path)
    assert torch.equal(logits(model, tokenizer, PROMPT), first)
