"""Whether the plugin is in place. SGLang only logs a plugin or a hook that fails, and then serves with its own classes."""

from __future__ import annotations

from ..hooking import missing
from ..plugins import SGLANG


def status() -> str:
    """One line: what SGLang would do here, and what is wrong. Loads SGLang's plugins, which ``doctor`` does not."""
    if (doubt := SGLANG.doubt()) is not None:
        return doubt
    try:
        left = missing_hooks()
    except Exception as error:  # another engine's import may fail in any way
        return f"SGLang cannot be imported: {error}"
    if left:
        return f"SGLang: the plugin is not in place at {', '.join(left)}"
    return f"SGLang {SGLANG.installed()}: the plugin is in place"


def check_installed() -> None:
    """
    Raises:
        RuntimeError: the plugin is not in place everywhere.
    """
    if left := missing_hooks():
        raise RuntimeError(f"this library's SGLang plugin is not in place at {', '.join(left)}; SGLang's log says why")


def missing_hooks() -> list[str]:
    """Targets that do not lead to our hooks, after SGLang's plugins were loaded."""
    from sglang.srt.plugins import load_plugins

    from .plugin import hooks

    load_plugins()
    return missing(hooks())
