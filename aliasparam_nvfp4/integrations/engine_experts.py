"""What vLLM and SGLang say of experts, and none of the two has for NVFP4."""

from __future__ import annotations

from ..errors import BackendError


def need_no_biases(found: bool, name: str) -> None:
    """
    Raises:
        BackendError: the experts have biases (gpt-oss).
    """
    if found:
        raise BackendError(
            "biases of experts: this engine's loaders of such a model know no NVFP4",
            name=name,
            expected="experts without biases",
            remedy="Serve the model with transformers, which loads them: docs/nvfp4/transformers.md.",
        )
