"""``verify --engine``: SGLang PR 25190's acceptance test in a real engine. Reloaded from disk, decode logprobs are unchanged."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from aliasparam.errors import AliasError

PROMPT = [3, 17, 5, 60, 8, 41, 2, 29]
TOKENS = 16
#: What SGLang's own test allows. Ours are bit-equal where the engine's kernels repeat themselves.
TOLERANCE = 1e-4


class Decoded(NamedTuple):
    """Greedily decoded tokens and their log-probabilities."""

    tokens: list[int]
    logprobs: list[float]


class Engine(NamedTuple):
    decode: Callable[[], Decoded]
    reload: Callable[[Path], None]
    stop: Callable[[], None]


def vllm(model: Path, tp: int, options: Mapping[str, Any]) -> Engine:
    from vllm import LLM, SamplingParams

    given = {"enable_prefix_caching": False, "max_model_len": 128, **options}
    llm = LLM(str(model), tensor_parallel_size=tp, **given)
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, logprobs=0)

    def decode() -> Decoded:
        out = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)[0].outputs[0]
        tokens = list(out.token_ids)
        return Decoded(tokens, [step[token].logprob for step, token in zip(out.logprobs or (), tokens, strict=True)])

    def reload(folder: Path) -> None:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})

    return Engine(decode, reload, llm.llm_engine.engine_core.shutdown)


def sglang(model: Path, tp: int, options: Mapping[str, Any]) -> Engine:
    import sglang as engine

    started = engine.Engine(model_path=str(model), tp_size=tp, **options)
    sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}

    def decode() -> Decoded:
        out = started.generate(input_ids=PROMPT, sampling_params=sampling, return_logprob=True)
        steps = out["meta_info"]["output_token_logprobs"]
        return Decoded([step[1] for step in steps], [step[0] for step in steps])

    def reload(folder: Path) -> None:
        for _ in range(100):  # a request that was answered is held for another step, and with it the cache
            if getattr(started.flush_cache(), "success", True):
                break
            time.sleep(0.1)
        success, message, *_ = started.update_weights_from_disk(str(folder))
        if not success:
            raise AliasError("SGLang refused the update", found=message)

    return Engine(decode, reload, started.shutdown)


ENGINES: Mapping[str, Callable[[Path, int, Mapping[str, Any]], Engine]] = {"vllm": vllm, "sglang": sglang}


def accept(name: str, model: Path, other: Path | None, tp: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Decode, reload ``model`` twice, then ``other`` and ``model`` again, decoding after each.

    Returns:
        ``rows``: what was loaded, the largest difference of logprobs from the first decode (None: other tokens), and whether it
        is as it should be; ``held``: whether all are.

    Raises:
        AliasError: no such engine, or it is not installed; the engine refused an update.
    """
    if name not in ENGINES:
        raise AliasError("unknown engine", expected=" or ".join(ENGINES), found=repr(name))
    try:
        engine = ENGINES[name](model, tp, options)
    except ImportError as error:
        raise AliasError(
            f"{name} cannot be imported: {error}", remedy=f"Install {name}; docs/nvfp4/{name}.md says how."
        ) from None
    try:
        first = engine.decode()
        rows = [_row("the same again", first, engine.decode())]
        for folder in [model, model, *([other, model] if other is not None else [])]:
            engine.reload(folder)
            rows.append(_row(str(folder), first, engine.decode(), differs=folder == other))
    finally:
        with suppress(Exception):  # an engine that failed may fail to stop
            engine.stop()
    return {"engine": name, "tp": tp, "rows": rows, "held": all(row["held"] for row in rows)}


def _row(what: str, first: Decoded, now: Decoded, *, differs: bool = False) -> dict[str, Any]:
    apart = None
    if first.tokens == now.tokens:
        apart = max(abs(a - b) for a, b in zip(first.logprobs, now.logprobs, strict=True))
    same = apart is not None and apart <= TOLERANCE
    return {"loaded": what, "apart": apart, "held": same != differs}
