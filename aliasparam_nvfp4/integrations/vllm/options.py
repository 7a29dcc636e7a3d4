"""What a user may say: ``--additional-config '{"aliasparam_nvfp4": {"backend": "triton"}}'``, or in the environment.

| key | environment | |
|---|---|---|
| ``backend`` | ``ALIASPARAM_NVFP4_BACKEND`` | linear layers: a backend, or "auto" |
| ``moe_backend`` | ``ALIASPARAM_NVFP4_MOE_BACKEND`` | experts: a runner, or "auto" |
| ``policy`` | ``ALIASPARAM_NVFP4_POLICY`` | of reloads, as for :func:`aliasparam.reload` |
| ``scope`` | ``ALIASPARAM_NVFP4_SCOPE`` | of weight updates: "all", or "layers": each layer that is begun must arrive whole |
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from aliasparam.errors import AliasError
from aliasparam.reload.policies import PolicyName

Scope = Literal["all", "layers"]


class OptionError(AliasError):
    """An option of the plugin that is none."""


@dataclass(frozen=True)
class Options:
    backend: str = "auto"
    moe_backend: str = "auto"
    policy: PolicyName = "write-through"
    scope: Scope = "all"

    def __post_init__(self) -> None:
        for name, known in (("policy", get_args(PolicyName)), ("scope", get_args(Scope))):
            if getattr(self, name) not in known:
                raise OptionError("no such option", name=name, expected=" or ".join(known), found=repr(getattr(self, name)))


def options(vllm_config: Any = None) -> Options:
    """Of ``vllm_config`` (default: the current one). What is in ``additional_config`` counts before the environment.

    Raises:
        OptionError: an unknown key, or a value that is none.
    """
    from vllm.config import get_current_vllm_config_or_none

    config = vllm_config or get_current_vllm_config_or_none()
    additional = getattr(config, "additional_config", None)
    given = additional.get("aliasparam_nvfp4", {}) if isinstance(additional, dict) else {}
    names = [field.name for field in fields(Options)]
    if unknown := sorted(set(given) - set(names)):
        raise OptionError("no such option", name="additional_config['aliasparam_nvfp4']", expected=names, found=unknown)
    environment = {n: v for n in names if (v := os.environ.get(f"ALIASPARAM_NVFP4_{n.upper()}"))}
    return Options(**{**environment, **given})
