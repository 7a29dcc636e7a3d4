"""What a user of an engine's plugin may say: in the environment (``ALIASPARAM_NVFP4_BACKEND=triton``), and, where the engine
hands them on, among its own options. Every key is in docs/nvfp4/engine-options.md."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

from aliasparam.errors import AliasError
from aliasparam.reload.policies import PolicyName

Scope: TypeAlias = Literal["all", "layers"]
#: Keys whose values are few. Backends know theirs.
_VALUES = {"policy": get_args(PolicyName), "session_policy": get_args(PolicyName), "scope": get_args(Scope)}


class OptionError(AliasError):
    """An option of the plugin that does not exist, or with a value that it does not take."""


def variable(key: str) -> str:
    return f"ALIASPARAM_NVFP4_{key.upper()}"


def said(key: str, default: Any = None) -> Any:
    """What the environment says, else ``default``.

    Raises:
        OptionError: it says what is no value of this key.
    """
    found = os.environ.get(variable(key))
    return need_known(variable(key), key, found) if found else default


def chosen(defaults: Mapping[str, Any], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """For each key of ``defaults`` what was given, else what the environment says, else the default.

    Args:
        where: what was given is called so in errors.

    Raises:
        OptionError: an unknown key or value.
    """
    if unknown := sorted(set(given) - set(defaults)):
        raise OptionError("no such option", name=where, expected=sorted(defaults), found=unknown)
    values = {key: need_known(f"{where}[{key!r}]", key, value) for key, value in given.items()}
    return {key: values[key] if key in values else said(key, default) for key, default in defaults.items()}


def need_known(name: str, key: str, value: Any) -> Any:
    """The value.

    Raises:
        OptionError: none of the known values of this key.
    """
    known = _VALUES.get(key)
    if known is not None and value not in known:
        raise OptionError("no such option", name=name, expected=" or ".join(known), found=repr(value))
    return value
