"""What a user says: SGLang's own flags, and environment variables that win over them."""

from __future__ import annotations

from typing import Any

from ..options import said

#: SGLang's names of MoE runners that are ours too; its others (marlin, lora, megamoe, …) stay SGLang's.
_RUNNERS = ("auto", "flashinfer_trtllm", "flashinfer_trtllm_routed", "flashinfer_cutlass", "flashinfer_cutedsl")


def reads(quant_config: Any) -> bool:
    """Whether weights come quantized, with scales that are not of each token."""
    return quant_config.is_checkpoint_nvfp4_serialized and not quant_config.use_per_token_activation


def linear_backend() -> str | None:
    """The backend's name, or None where the user asked for one that is SGLang's alone.

    ``--fp4-gemm-backend`` as it was said: ``sglang/srt/layers/quantization/fp4_utils.py`` makes SGLang's own choice of "auto".
    """
    from sglang.srt.runtime_context import get_exec

    asked = said("backend") or get_exec().kernel.fp4_gemm_runner_backend or "auto"
    return None if asked == "marlin" else asked


def moe_backend() -> str | None:
    """The same for experts, of ``--moe-runner-backend`` (``sglang/srt/layers/moe/utils.py``)."""
    from sglang.srt.layers.moe import get_moe_a2a_backend, get_moe_runner_backend

    named: str | None = said("moe_backend")
    if named is not None:
        return named
    asked: str = get_moe_runner_backend().value
    if not get_moe_a2a_backend().is_none():
        return None  # experts behind DeepEP and the like get inputs of another form
    return asked if asked in _RUNNERS else None
