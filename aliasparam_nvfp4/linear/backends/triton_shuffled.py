"""``triton_shuffled``: our W4A16 kernel from the TRT-LLM kernel format, so that such layers run before Blackwell too."""

from __future__ import annotations

from ._layouts import SHUFFLED
from .triton import Triton


class TritonShuffled(Triton):
    name = "triton_shuffled"
    layout = SHUFFLED
    rank = 1
    shuffled = True


BACKEND = TritonShuffled()
