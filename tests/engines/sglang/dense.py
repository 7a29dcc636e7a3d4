"""The demo's model in SGLang's own runner, and sessions of its updater."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from aliasparam import checkpoint_digest

from .folders import DENSE

#: A weight of the model.
OUT = "model.layers.3.self_attn.o_proj.weight"


class Dense:
    """The demo's A in a runner, and what a fresh load of each folder serves."""

    def __init__(self) -> None:
        from .runner import Runner

        fresh = Runner(DENSE["b"])
        self.b, self.digest_b = fresh.logits(), digest(fresh.model)
        self.runner = Runner(DENSE["a"])
        self.a, self.digest_a = self.runner.logits(), digest(self.runner.model)
        self.updater, self.model, self.addresses = self.runner.updater, self.runner.model, self.runner.addresses()

    def update(self, folder: Path) -> tuple[bool, str]:
        return self.updater.update_weights_from_disk(str(folder), "auto")  # type: ignore[no-any-return]

    def serves(self, tag: str) -> bool:
        logits, whole = (self.a, self.digest_a) if tag == "a" else (self.b, self.digest_b)
        same = torch.equal(self.runner.logits(), logits) and digest(self.model) == whole
        return same and self.runner.addresses() == self.addresses


def digest(model: Any) -> str:
    return checkpoint_digest(model).whole


def tensors_of(tag: str, part: str = "") -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in load_file(DENSE[tag] / "model.safetensors").items() if part in name]


def session(dense: Dense, *updates: list[tuple[str, Tensor]], **options: Any) -> list[tuple[bool, str]]:
    dense.updater.begin_weight_update()
    answers = [dense.updater.update_weights_from_tensor(tensors, **options) for tensors in updates]
    assert dense.serves("a")  # until the end the old weights do
    dense.updater.end_weight_update(run_post_load=not updates)
    return answers


def in_pieces(dense: Dense, tag: str) -> None:
    """The whole model, as trainers send it."""
    dense.updater.begin_weight_update()
    whole = tensors_of(tag)
    for first in range(0, len(whole), 100):
        assert dense.updater.update_weights_from_tensor(whole[first : first + 100])[0]
    dense.updater.end_weight_update(run_post_load=False)
