"""SGLang's LoRA over our linear layers: answers with an adapter and without, before and after an update.

Its layers ask for pinned memory, which only a machine with an accelerator has: stub/aliasparam_probe.py gives them plain memory.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("sglang", reason="SGLang is not installed: make test-sglang")

from ...nvfp4.moe_models import exact
from ..adapters import RANK, adapter, merged
from ..biases import PROMPT, after, biased
from .engine import engine


def test_an_adapter_over_a_layer_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIASPARAM_PROBE_UNPINNED", "1")
    folders = [biased(tmp_path / tag, seed) for seed, tag in enumerate("ab")]
    lora = adapter(folders[0], tmp_path / "lora")
    options = {"enable_lora": True, "lora_paths": [f"lora={lora}"], "max_lora_rank": RANK, "lora_backend": "torch_native"}
    with engine(folders[0], **options) as warm:

        def answer(path: str | None = None) -> torch.Tensor:
            greedy = {"temperature": 0, "max_new_tokens": 1}
            wanted = {"return_logprob": True, "token_ids_logprob": list(range(64)), "lora_path": path}
            found = warm.generate(input_ids=PROMPT, sampling_params=greedy, **wanted)["meta_info"]
            return torch.tensor([value[0] for value in found["output_token_ids_logprobs"][0]])

        for folder in folders:
            warm.update_weights_from_disk(str(folder))
            plain, adapted = after(exact(folder), PROMPT), after(merged(folder, lora), PROMPT)
            assert (plain - adapted).abs().max() > 3
            assert (answer() - plain).abs().max() < 0.3 and (answer("lora") - adapted).abs().max() < 0.3
