"""What a user of an engine's plugin may say in the environment: ``ALIASPARAM_NVFP4_BACKEND=triton``. Every key is in
docs/nvfp4/engine-options.md."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import cast, get_args

from aliasparam.errors import AliasError
from aliasparam.reload.policies import PolicyName


class OptionError(AliasError):
    """An option of the plugin that does not exist, or with a value that it does not take."""


def variable(key: str) -> str:
    return f"ALIASPARAM_NVFP4_{key.upper()}"


def said(key: str) -> str | None:
    """What the environment says, or None where it says nothing."""
    return os.environ.get(variable(key)) or None


def need_known(name: str, value: str, known: Sequence[str]) -> None:
    """
    Raises:
        OptionError: none of the known values.
    """
    if value not in known:
        raise OptionError("no such option", name=name, expected=" or ".join(known), found=repr(value))


def policy(key: str, default: PolicyName) -> PolicyName:
    """What is kept while weights are replaced; see docs/reload.md.

    Raises:
        OptionError: the variable names no policy.
    """
    named = said(key) or default
    need_known(variable(key), named, get_args(PolicyName))
    return cast(PolicyName, named)
