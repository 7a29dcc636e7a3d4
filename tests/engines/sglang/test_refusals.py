"""A model that refuses, in an engine as servers run: with a cache of prefixes, and batches planned while another runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang", reason="SGLang is not installed: make test-sglang")

from ..vllm.tiny import tiny_dense
from .engine import GREEDY, LONG, SAID, engine, fails, update
from .folders import moe


def test_a_model_that_refuses_leaves_nothing_in_the_cache_of_prefixes(tmp_path: Path) -> None:
    from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

    folder = moe(tmp_path / "a", 0)
    with engine(folder, chunked_prefill_size=32, disable_radix_cache=False, disable_overlap_schedule=False) as warm:
        ask = {"input_ids": LONG, "sampling_params": GREEDY}
        first = warm.generate(**ask)["output_ids"]
        assert warm.flush_cache().success
        fails(warm)
        keep = UpdateWeightFromDiskReqInput(model_path=str(folder), flush_cache=False)
        assert warm.loop.run_until_complete(warm.tokenizer_manager.update_weights_from_disk(keep, None))[0]
        again = warm.generate(**ask)
        assert again["output_ids"] == first and again["meta_info"]["cached_tokens"] == 0


def test_embeddings_fail_and_the_engine_goes_on(tmp_path: Path) -> None:
    from sglang.srt.managers.io_struct import EmbeddingReqInput

    folder = tiny_dense(tmp_path / "a", 0)
    with engine(folder, is_embedding=True, chunked_prefill_size=32) as warm:

        def embedding(tokens: list[int]) -> Any:
            answers = warm.tokenizer_manager.generate_request(EmbeddingReqInput(input_ids=tokens), None)
            return warm.loop.run_until_complete(answers.__anext__())["embedding"]

        first = embedding(LONG)
        warm.collective_rpc("invalidate_all")
        for tokens in (LONG, LONG[:5]):
            with pytest.raises(Exception, match=SAID):
                embedding(tokens)
        assert update(warm, folder) and embedding(LONG) == first
