"""The real engine on a CPU, and looks into it."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_CPU_CI_ENV="1",  # no warm-up
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # functions to workers
    HF_HUB_OFFLINE="1",
)
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
pytest.importorskip("vllm", reason="vLLM is not installed: make engine-vllm, then make test-vllm")

import torch
from vllm import LLM, SamplingParams

from ..biases import PROMPT

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def start(folder: Path, **options: Any) -> LLM:
    """An engine of a folder; without compilation where it is not asked for, and without a cache of prefixes, which vLLM does not
    forget at a reload."""
    given = {"enforce_eager": True, "max_model_len": 128, "enable_prefix_caching": False, "disable_log_stats": True}
    return LLM(str(folder), dtype="bfloat16", **{**given, **options})


def stop(llm: LLM) -> None:
    llm.llm_engine.engine_core.shutdown()
    llm.__dict__.clear()
    gc.collect()


def said(llm: LLM) -> str:
    """What the engine answers, or how the request ended if it was not answered."""
    output = llm.chat([QUESTION], SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)[0].outputs[0]
    return output.text if output.finish_reason != "error" else "(error)"


def tokens(llm: LLM, count: int = 6) -> list[int]:
    """What a model without a tokenizer goes on with."""
    prompt = {"prompt_token_ids": [3, 17, 5, 60, 8, 41, 2, 29]}
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    return list(llm.generate([prompt], sampling, use_tqdm=False)[0].outputs[0].token_ids)


def answer(llm: LLM, **options: Any) -> torch.Tensor:
    """Log probabilities of the token after the prompt, ``[V]``; of an engine whose ``max_logprobs`` are those of 64 tokens."""
    sampling = SamplingParams(temperature=0, max_tokens=1, logprobs=64, detokenize=False)
    found = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False, **options)[0].outputs[0].logprobs[0]
    return torch.tensor([found[token].logprob for token in range(64)])


def digest(llm: LLM) -> list[str]:
    """Of each rank, over checkpoint bytes."""

    def probe(worker: Any) -> str:
        from aliasparam import checkpoint_digest

        return str(checkpoint_digest(worker.model_runner.get_model()).whole)

    return llm.collective_rpc(probe)


def addresses(llm: LLM) -> list[dict[str, int]]:
    """Of every parameter and buffer of each rank."""

    def probe(worker: Any) -> dict[str, int]:
        model = worker.model_runner.get_model()
        return {name: tensor.data_ptr() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}

    return llm.collective_rpc(probe)


def model_of(llm: LLM) -> Any:
    """In this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.get_model()


def reload(llm: LLM, **arguments: Any) -> None:
    llm.collective_rpc("reload_weights", kwargs=arguments)
