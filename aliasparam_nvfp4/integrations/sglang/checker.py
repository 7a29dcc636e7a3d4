"""``/weights_checker``: snapshot, reset_tensors, compare and checksum see checkpoint values under checkpoint names, once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..serving import without_kernel_names


def model_state(original: Any, checker: Any) -> Iterator[tuple[str, Tensor]]:
    """AROUND ``WeightChecker._model_state`` (``sglang/srt/utils/weight_checker.py``, 0.5.23)."""
    return without_kernel_names(checker._get_model(), original(checker))
