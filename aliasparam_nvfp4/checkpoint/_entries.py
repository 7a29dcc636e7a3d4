"""Entries of a quantization config, each refused by name where it is not of its kind."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .errors import CheckpointError

#: Regular expressions that need no compiling to be known as such; there may be thousands.
_PLAIN = re.compile(r"re:\^?(?:[\w\-]|\\?\.|\.\*|\((?:[\w\-|]|\\\.)*\))*\$?")


def mapping(holder: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """The object under ``key``; empty where there is none."""
    value = holder.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise _bad(where, key, "an object", value)
    return value or {}


def mappings(holder: Mapping[str, Any], key: str, where: str) -> Mapping[str, Mapping[str, Any]]:
    """The object of objects under ``key``; empty where there is none."""
    values = mapping(holder, key, where)
    return {name: mapping(values, name, f"{where}: {key}") for name in values}


def patterns(holder: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """The patterns of module names under ``key``; a string is one pattern.

    Raises:
        CheckpointError: not strings, or a regular expression that is none.
    """
    value = holder.get(key) or ()
    if isinstance(value, str):
        return patterns({key: [value]}, key, where)
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        raise _bad(where, key, "a list of module names", value)
    for pattern in value:
        if pattern.startswith("re:") and not _PLAIN.fullmatch(pattern):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise _bad(where, key, f"a regular expression after re: ({error})", pattern) from None
    return tuple(value)


def text(holder: Mapping[str, Any], key: str, where: str) -> str | None:
    """The string under ``key``, or None where there is none."""
    value = holder.get(key)
    if value is not None and not isinstance(value, str):
        raise _bad(where, key, "a string", value)
    return value


def whole_number(holder: Mapping[str, Any], key: str, where: str) -> int:
    value = holder[key]
    if not isinstance(value, int) or isinstance(value, bool):
        raise _bad(where, key, "a whole number", value)
    return value


def kv_cache_algo(holder: Mapping[str, Any], where: str) -> str | None:
    """The KV cache's quantization by ``kv_cache_scheme``, in ModelOpt's words ("FP8")."""
    scheme = holder.get("kv_cache_scheme")
    if scheme is None or isinstance(scheme, str):
        return scheme
    found = mapping(holder, "kv_cache_scheme", where)
    return f"FP{whole_number(found, 'num_bits', where)}" if "num_bits" in found else None


def _bad(where: str, key: str, expected: str, found: Any) -> CheckpointError:
    return CheckpointError(
        "an entry of the quantization config is not of its kind",
        name=f"{where}: {key}",
        expected=expected,
        found=repr(found)[:120],
    )
