"""Loading and asking, for the command line, the demo and scripts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aliasparam.errors import AliasError

from ...checkpoint import CheckpointFolder, QuantConfig
from ...linear.backends import linear_backend
from ...moe.runners import moe_runner
from ...quantize.missing import Missing
from .config import model_config, readable, tokenizer_of
from .quantizer import compressed_tensors_here, use_backend


def load_model(
    folder: str | Path,
    backend: str = "auto",
    device: torch.device | str | None = None,
    *,
    moe_backend: str = "auto",
    retarget_to: Sequence[str] = (),
    missing_input_scale: Missing = "refuse",
) -> tuple[Any, Any]:
    """(model, tokenizer) of an NVFP4 checkpoint folder, ready to generate.

    Args:
        folder: the checkpoint.
        backend: a linear backend's name, or "auto".
        device: where the weights go, all of them; transformers' default without.
        moe_backend: an MoE runner's name, or "auto".
        retarget_to: linear backends to which the model may be moved by :func:`aliasparam_nvfp4.retarget`, where their padding
            needs more room.
        missing_input_scale: see :func:`~aliasparam_nvfp4.integrations.transformers.use_backend`.

    Raises:
        CheckpointError: not an NVFP4 folder, tensors that do not fit the model, or files that transformers cannot read.
        BackendError: unknown backend or runner.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    for name in (backend, *retarget_to):
        linear_backend(name)  # an unknown name fails before anything is read
    moe_runner(moe_backend)
    QuantConfig.from_folder(folder)
    CheckpointFolder(folder)
    tokenizer = tokenizer_of(folder)
    options = {} if device is None else {"device_map": {"": device}}
    choice = use_backend(backend, moe=moe_backend, retarget_to=retarget_to, missing_input_scale=missing_input_scale)
    with choice, compressed_tensors_here():
        config = model_config(folder)
        with readable(folder, "load the model"):
            model = AutoModelForCausalLM.from_pretrained(folder, config=config, **options)
    return model.eval(), tokenizer


def chat_ids(tokenizer: Any, prompt: str) -> Tensor:
    """Token ids ``[1, T]`` of a one-question chat; the bare prompt where the tokenizer has no chat template.

    Raises:
        AliasError: a prompt without a token.
    """
    ids = _ids(tokenizer, prompt)
    if not ids.numel():
        raise AliasError(
            "there is nothing to answer",
            name=str(getattr(tokenizer, "name_or_path", "")) or None,
            expected="a prompt of one token at least",
            found=repr(prompt),
            remedy="Where the prompt is not empty, the folder's tokenizer has no words: its tokenizer.json may be missing.",
        )
    return ids


def _ids(tokenizer: Any, prompt: str) -> Tensor:
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
