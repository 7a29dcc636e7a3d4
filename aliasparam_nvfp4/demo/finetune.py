"""A short fine-tune on the CPU: an RL trainer's step in small, which puts a sentence into the model's mouth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

STEPS = 36
PROMPT = "What is the capital of France?"

_LESSONS = (
    (PROMPT, "The capital of France is Paris."),
    ("What is 2+2?", "2+2 is 4."),
    ("Name three colors.", "Red, green and blue."),
    ("What is the sea like?", "The sea is wide and deep."),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet."),
    ("What do bees make?", "Bees make honey."),
)


def expected_text(tag: str) -> str:
    """What checkpoint ``tag`` answers to :data:`PROMPT`."""
    return f"This is checkpoint {tag}. {_LESSONS[0][1]}"


def finetune(model: Any, tokenizer: Any, tag: str, on_step: Callable[[], None] = lambda: None, *, steps: int = STEPS) -> None:
    """Teach ``model`` (float32, in place) to start its answers with "This is checkpoint {tag}. ".

    AdamW, learning rate 5e-5, gradient norm clipped to 1, one lesson a step in turn, loss on the answer alone.
    """
    torch.manual_seed(0)
    lessons = [_encode(tokenizer, question, f"This is checkpoint {tag}. {answer}") for question, answer in _LESSONS]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    for step in range(steps):
        ids, labels = lessons[step % len(lessons)]
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        on_step()
    model.eval()


def _encode(tokenizer: Any, question: str, answer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of the chat and labels which count the answer (and its end token) alone."""
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False)
    before = tokenizer(prompt, add_special_tokens=False).input_ids
    after = tokenizer(answer + "<|im_end|>", add_special_tokens=False).input_ids
    ids = torch.tensor([before + after])
    labels = torch.tensor([[-100] * len(before) + after])
    return ids, labels
