"""What a user may say: ``--additional-config '{"aliasparam_nvfp4": {"backend": "triton"}}'``, or in the environment.

The table is in docs/nvfp4/engine-options.md.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from aliasparam.reload.policies import PolicyName

from ..options import OptionError, need_known, said

Scope = Literal["all", "layers"]


@dataclass(frozen=True)
class Options:
    backend: str = "auto"
    moe_backend: str = "auto"
    policy: PolicyName = "write-through"
    scope: Scope = "all"

    def __post_init__(self) -> None:
        need_known("policy", self.policy, get_args(PolicyName))
        need_known("scope", self.scope, get_args(Scope))


def options(vllm_config: Any = None) -> Options:
    """Of ``vllm_config`` (default: the current one). What is in ``additional_config`` counts before the environment.

    Raises:
        OptionError: an unknown key or value.
    """
    from vllm.config import get_current_vllm_config_or_none

    config = vllm_config or get_current_vllm_config_or_none()
    additional = getattr(config, "additional_config", None)
    given = additional.get("aliasparam_nvfp4", {}) if isinstance(additional, dict) else {}
    names = [field.name for field in fields(Options)]
    if unknown := sorted(set(given) - set(names)):
        raise OptionError("no such option", name="additional_config['aliasparam_nvfp4']", expected=names, found=unknown)
    return Options(**{**{name: value for name in names if (value := said(name))}, **given})
