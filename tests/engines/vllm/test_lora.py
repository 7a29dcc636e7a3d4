"""vLLM's LoRA over our linear layers: answers with an adapter and without, before and after a reload."""

from __future__ import annotations

from pathlib import Path

from .engine import answer, reload, start, stop  # skips without vLLM

from vllm.lora.request import LoRARequest  # isort: skip
from ..adapters import RANK, adapter, merged  # isort: skip
from ..biases import PROMPT, after, biased  # isort: skip
from ...nvfp4.moe_models import exact  # isort: skip


def test_an_adapter_over_a_layer_of_ours(tmp_path: Path) -> None:
    folders = [biased(tmp_path / tag, seed) for seed, tag in enumerate("ab")]
    lora = adapter(folders[0], tmp_path / "lora")
    request = LoRARequest("lora", 1, str(lora))
    llm = start(folders[0], skip_tokenizer_init=True, max_logprobs=64, enable_lora=True, max_lora_rank=RANK)
    for folder in folders:
        reload(llm, weights_path=str(folder))
        plain, adapted = after(exact(folder), PROMPT), after(merged(folder, lora), PROMPT)
        assert (plain - adapted).abs().max() > 3
        assert (answer(llm) - plain).abs().max() < 0.3 and (answer(llm, lora_request=request) - adapted).abs().max() < 0.3
    stop(llm)
