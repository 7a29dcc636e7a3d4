"""Loading and asking, for the command line, the demo and scripts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint import QuantConfig
from .quantizer import compressed_tensors_here, use_backend


def load_model(
    folder: str | Path, backend: str = "auto", device: torch.device | str | None = None, *, moe_backend: str = "auto"
) -> tuple[Any, Any]:
    """(model, tokenizer) of an NVFP4 checkpoint folder, ready to generate.

    Args:
        folder: the checkpoint.
        backend: a linear backend's name, or "auto".
        device: where the weights go, all of them; transformers' default without.
        moe_backend: an MoE runner's name, or "auto".

    Raises:
        CheckpointError: not an NVFP4 folder, or tensors that do not fit the model.
        BackendError: unknown backend or runner.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    QuantConfig.from_folder(folder)
    with use_backend(backend, moe=moe_backend), compressed_tensors_here():
        model = AutoModelForCausalLM.from_pretrained(folder, **({} if device is None else {"device_map": {"": device}}))
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def chat_ids(tokenizer: Any, prompt: str) -> Tensor:
    """Token ids ``[1, T]`` of a one-question chat; the bare prompt where the tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer(prompt, return_tensors="pt").input_ids  # type: ignore[no-any-return]
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids  # type: ignore[no-any-return]


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int = 24, on_text: Callable[[str], None] | None = None
) -> str:
    """The greedy answer; ``on_text`` is given its pieces as they come."""
    ids = chat_ids(tokenizer, prompt).to(model.device)
    streamer = _Streamer(tokenizer, on_text) if on_text else None
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=streamer,
    )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


@torch.no_grad()
def logits(model: Any, tokenizer: Any, prompt: str) -> Tensor:
    """Logits ``[1, T, vocab]`` of the prompt."""
    ids = chat_ids(tokenizer, prompt).to(model.device)
    return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


def _Streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                on_text(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
