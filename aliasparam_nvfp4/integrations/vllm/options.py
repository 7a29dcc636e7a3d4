"""What a user may say: ``--additional-config '{"aliasparam_nvfp4": {"backend": "triton"}}'``, or in the environment.

The table is in docs/nvfp4/engine-options.md.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vllm.config import get_current_vllm_config_or_none

from aliasparam.reload.policies import PolicyName

from ..options import Scope, chosen


@dataclass(frozen=True)
class Options:
    backend: str = "auto"
    moe_backend: str = "auto"
    policy: PolicyName = "write-through"
    scope: Scope = "all"


def options(vllm_config: Any = None) -> Options:
    """Of ``vllm_config`` (default: the current one). What is in ``additional_config`` counts before the environment.

    Raises:
        OptionError: an unknown key or value.
    """
    additional = getattr(vllm_config or get_current_vllm_config_or_none(), "additional_config", None)
    given = additional.get("aliasparam_nvfp4", {}) if isinstance(additional, dict) else {}
    return Options(**chosen(asdict(Options()), given, "additional_config['aliasparam_nvfp4']"))
