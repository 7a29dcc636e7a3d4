"""What a user says: SGLang's own flags, and environment variables that win over them."""

from __future__ import annotations

import os
from typing import cast, get_args

from aliasparam.reload.policies import PolicyName

from ...errors import BackendError

LINEAR, MOE = "ALIASPARAM_LINEAR_BACKEND", "ALIASPARAM_MOE_BACKEND"
DISK, SESSION = "ALIASPARAM_DISK_POLICY", "ALIASPARAM_SESSION_POLICY"
#: SGLang's names of MoE runners that are ours too; its others (marlin, lora, megamoe, …) stay SGLang's.
_RUNNERS = ("auto", "flashinfer_trtllm", "flashinfer_trtllm_routed", "flashinfer_cutlass", "flashinfer_cutedsl")


def linear_backend() -> str | None:
    """The backend's name, or None where the user asked for one that is SGLang's alone.

    ``--fp4-gemm-backend`` as it was said: ``sglang/srt/layers/quantization/fp4_utils.py`` makes SGLang's own choice of "auto".
    """
    from sglang.srt.runtime_context import get_exec

    asked = os.environ.get(LINEAR) or get_exec().kernel.fp4_gemm_runner_backend or "auto"
    return None if asked == "marlin" else asked


def moe_backend() -> str | None:
    """The same for experts, of ``--moe-runner-backend`` (``sglang/srt/layers/moe/utils.py``)."""
    from sglang.srt.layers.moe import get_moe_a2a_backend, get_moe_runner_backend

    if (named := os.environ.get(MOE)) is not None:
        return named
    asked = get_moe_runner_backend().value
    if not get_moe_a2a_backend().is_none():
        return None  # experts behind DeepEP and the like get inputs of another form
    return asked if asked in _RUNNERS else None


def policy(variable: str, default: PolicyName) -> PolicyName:
    """What is kept while weights are replaced; see docs/reload.md.

    Raises:
        BackendError: the variable names no policy.
    """
    named = os.environ.get(variable, default)
    if named not in get_args(PolicyName):
        raise BackendError("unknown policy", name=variable, expected=", ".join(get_args(PolicyName)), found=named)
    return cast(PolicyName, named)
